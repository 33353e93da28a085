"""What an evaluation consists of: variants, the cells variant x budget x seed, and what identifies each of them."""

from __future__ import annotations

import hashlib
import json
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from ..allocation import SHARES
from ..checks import is_count, is_share
from ..errors import ArgumentError, BudgetError
from ..files import crc32
from ..layers import count_params
from .variants import DENSE, KINDS, Variant, _digest, callable_name


@dataclass(frozen=True)
class Cell:
    """One entry of the table; the variant "dense" with share 1 is the model as it is."""

    variant: str
    share: float
    seed: int


@dataclass(frozen=True)
class Task:
    """What all cells have in common."""

    model: nn.Module | Callable[[int], nn.Module]
    quality: Callable[[nn.Module], float]
    variants: dict[str, Variant]
    kind: str = "params"
    example_inputs: Any = None
    data: Callable[[int], Any] | None = None
    after: Callable[[nn.Module, int], nn.Module] | None = None

    @property
    def setting(self) -> dict[str, Any]:
        """What all results in one folder have in common beside the weights, JSON-ready."""
        calls = {n: None if (f := getattr(self, n)) is None else callable_name(f) for n in ("quality", "after")}
        return {"budget": self.kind, **calls, "inputs": _digest(self.example_inputs)}

    def key(self, cell: Cell) -> str:
        """A hash of what the cell's result depends on beside the setting and the weights (:func:`model_mark`)."""
        known: dict[str, Any] = {"variant": DENSE, "share": cell.share, "seed": cell.seed}
        if cell.variant != DENSE:
            variant = self.variants[cell.variant]
            data = callable_name(self.data) if variant.needs_data and self.data is not None else None
            known |= {"variant": variant.identity, "data": data}
        return hashlib.sha256(json.dumps(known, sort_keys=True).encode()).hexdigest()[:20]


def model_mark(model: nn.Module) -> str:
    """Class, number of parameters and CRC-32 of names and values of the state dict."""
    total = 0
    for name, value in model.state_dict().items():
        tensor = isinstance(value, Tensor) and not value.is_meta
        text = f"{name} {tuple(value.shape)} {value.dtype} {crc32(value)}" if tensor else name
        total = zlib.crc32(text.encode(), total)
    return f"{type(model).__name__}, {count_params(model):,} parameters, crc {total:08x}"


def check_cells(budgets: Sequence[float], budget: str, seeds: Sequence[int], example_inputs: Any) -> None:
    """ArgumentError or BudgetError unless these are shares in (0, 1], a kind of budget and different seeds."""
    if budget not in KINDS:
        raise ArgumentError(f"budget={budget!r} is not one of {', '.join(KINDS)}")
    if budget == "flops" and example_inputs is None:
        raise ArgumentError("budget='flops' needs example_inputs=, a tensor, tuple or dict as model(...) takes it")
    if isinstance(budgets, str) or not isinstance(budgets, Sequence) or not budgets:
        raise BudgetError(f"budgets={budgets!r}: expected a list of shares in (0, 1], for example (0.5, 0.3)")
    for share in budgets:
        if not is_share(share):
            raise BudgetError(f"budgets: {share!r} is outside (0, 1]: it is the share of {SHARES[budget]}")
    if not isinstance(seeds, Sequence) or not seeds or not all(is_count(seed, 0) for seed in seeds):
        raise ArgumentError(f"seeds={seeds!r}: expected a list of integers >= 0")
    for name, values in (("budgets", budgets), ("seeds", seeds)):
        if len(set(values)) < len(values):
            raise ArgumentError(f"{name}={values!r} holds the same value twice")
