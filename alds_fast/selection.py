"""Which layers users mean: by name, by pattern or by class, their own or that of a module which holds them."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

from torch import nn

from .errors import ArgumentError, LayerNotFoundError

Selector = str | type[nn.Module]
Selection = Selector | Iterable[Selector] | None

WAS = "alds_was"  # names of the class of the module that this one stands for


def patterns(value: Selection, argument: str) -> tuple[str, ...] | None:
    """Patterns as texts, those of classes their full names; None for none given, ArgumentError for anything else.

    >>> patterns(["head", nn.Linear], "exclude")
    ('head', 'torch.nn.modules.linear.Linear')
    """
    if value is None:
        return None
    several = (value,) if isinstance(value, str | type) else tuple(value) if isinstance(value, Iterable) else (0,)
    if not all(isinstance(p, str) or (isinstance(p, type) and issubclass(p, nn.Module)) for p in several):
        raise ArgumentError(
            f"{argument}={value!r}: expected a name pattern or several, or classes of modules, for example "
            f"'layer4.*' or torch.nn.Linear"
        )
    return tuple(p if isinstance(p, str) else _full_name(p) for p in several)


def _full_name(kind: type) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"


def names_of_class(kind: type) -> frozenset[str]:
    """What a class of modules and its bases are called, in short and in full."""
    kinds = [k for k in kind.__mro__ if issubclass(k, nn.Module) and k is not nn.Module]
    return frozenset(name for k in kinds for name in (k.__name__, _full_name(k)))


class ModuleNames:
    """The modules of a model, asked whether a pattern means one of them.

    A pattern means a module if it is, with shell-style wildcards, the name of the module or of one that holds it; or
    if it is the class, or a base class, of the module or of one that holds it, in short or in full; of a module that
    stands for another one the class of either.

    >>> places = ModuleNames(nn.Sequential(nn.Sequential(nn.Linear(2, 2), nn.ReLU()), nn.Linear(2, 2)))
    >>> [places.means(pattern, "0.0") for pattern in ("0.0", "0", "?.0", "Linear", "1", "ReLU")]
    [True, True, True, True, False, False]
    """

    def __init__(self, model: nn.Module) -> None:
        self._kinds = {
            name: names_of_class(type(module)) | vars(module).get(WAS, frozenset())
            for name, module in model.named_modules()
        }

    def means(self, pattern: str, name: str) -> bool:
        """Whether the pattern means the module of that name."""
        holders = [name, *_names_above(name)]
        if any(fnmatchcase(holder, pattern) for holder in holders):
            return True
        return any(pattern in self._kinds.get(holder, ()) for holder in (*holders, ""))

    def match(self, patterns: Iterable[str], name: str) -> bool:
        """Whether one of the patterns means the module of that name."""
        return any(self.means(p, name) for p in patterns)

    def check(self, patterns: Iterable[str], names: Sequence[str], argument: str) -> None:
        """LayerNotFoundError for a pattern that means none of the layers of these names."""
        for pattern in patterns:
            if not any(self.means(pattern, name) for name in names):
                known = [*names, *{above: None for name in names for above in _names_above(name)}]
                close = difflib.get_close_matches(pattern, known, n=3) or [name for name in names if name][:3]
                raise LayerNotFoundError(
                    f"{argument}={pattern!r} matches no layer, neither by name nor by class; layers are, for example, "
                    f"{close}"
                )

    def by_layer(self, given: Mapping[Any, Any], names: Sequence[str], argument: str) -> dict[str, dict[str, Any]]:
        """Of every layer meant by a key of ``given``, the values by pattern, in the order given."""
        values: dict[str, Any] = {}
        for key, value in given.items():
            values |= dict.fromkeys(patterns((key,), argument) or (), value)
        self.check(values, names, argument)
        of_layers = {name: {p: v for p, v in values.items() if self.means(p, name)} for name in names}
        return {name: meant for name, meant in of_layers.items() if meant}


def _names_above(name: str) -> Iterator[str]:
    """The names of the modules that hold the one of that name, but for the model's own."""
    while "." in name:
        name = name.rpartition(".")[0]
        yield name
