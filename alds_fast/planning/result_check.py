"""What a compressed model must hold before it is given back."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from ..errors import ModelError
from ..layers import AbsentWeight, LowRankLayer, count_params, label
from ..measurement import keeping_state, private_runs


def check_result(small: nn.Module, chosen: Iterable[str], params: int) -> None:
    """ModelError unless the model has low-rank layers of finite values at these places, and so many parameters."""
    modules = dict(small.named_modules(remove_duplicate=False))
    for name in chosen:
        layer = modules.get(name)
        if not isinstance(layer, LowRankLayer):
            raise ModelError(
                f"layer {label(name)} was not replaced: it is a {type(layer).__name__} in the copy of the model; leave "
                f"it out with exclude={[name]!r}"
            )
        for kind, value in layer.named_parameters():
            if not bool(value.isfinite().all()):
                raise ModelError(
                    f"layer {label(name)}: its {kind} has values outside the range of {value.dtype}; leave it out with "
                    f"exclude={[name]!r}, or compress the model in a wider type"
                )
    if count_params(small) != params:
        raise ModelError(
            f"the compressed model has {count_params(small):,} parameters, its plan {params:,}: something in the model "
            f"holds on to dense weights, or holds the new ones twice"
        )


def first_batch(model: nn.Module, data: Any) -> Any:
    """The first of the batches; None where they can be gone through once only."""
    if data is None:
        return None
    with keeping_state(model):  # a loader draws from the random numbers
        batches = iter(data)
        return None if batches is data else next(batches, None)


def check_run(model: nn.Module, small: nn.Module, inputs: Any) -> None:
    """ModelError unless the compressed model runs on the inputs, with outputs as those of the dense one.

    They must be as many, of the same shapes, and finite where those are. Both models are left as they were.
    """
    if inputs is None:
        return
    try:
        with private_runs(model) as run:
            before = _outputs(run(inputs, 0, "example_inputs"))
    except Exception as e:
        raise ModelError(
            f"the inputs did not run through the dense model ({type(e).__name__}: {e}); pass what model(...) takes"
        ) from e
    try:
        with naming_readers(small), private_runs(small) as run:
            after = _outputs(run(inputs, 0, "example_inputs"))
    except ModelError:
        raise
    except Exception as e:
        raise ModelError(f"the compressed model does not run ({type(e).__name__}: {e})") from e
    if [y.shape for y in before] != [y.shape for y in after]:
        shapes = [[tuple(y.shape) for y in outputs] for outputs in (before, after)]
        raise ModelError(f"the compressed model gives outputs of shapes {shapes[1]}, the dense one {shapes[0]}")
    lost = [i for i, (x, y) in enumerate(zip(before, after, strict=True)) if _finite(x) and not _finite(y)]
    if lost:
        raise ModelError(
            f"output {lost[0]} of the compressed model is not finite where the dense model's is: a value between two "
            f"factors is outside the range of the type; compress the model in a wider type"
        )


@contextmanager
def naming_readers(small: nn.Module) -> Iterator[None]:
    """What a model raises because it wants a dense weight that is not there becomes a ModelError with the layer."""
    try:
        yield
    except Exception as e:
        reader = _reader(small, e)
        if reader is None:
            raise
        raise ModelError(
            f"the compressed model does not run: it computes with the weight of layer {label(reader)} instead of "
            f"calling it; leave that out with exclude={[reader]!r}"
        ) from e


def _outputs(output: Any) -> list[Tensor]:
    parts = list(output.values()) if isinstance(output, Mapping) else output
    return [leaf for leaf in tree_leaves(parts) if isinstance(leaf, Tensor)]


def _finite(y: Tensor) -> bool:
    return not y.is_floating_point() or bool(torch.isfinite(y).all())


def _reader(small: nn.Module, error: BaseException | None) -> str | None:
    """The layer whose dense weight the model asked for, by the error that says that there is none."""
    while error is not None:
        weight = getattr(error, "obj", None)
        if isinstance(weight, AbsentWeight):
            layers = ((n, m) for n, m in small.named_modules() if isinstance(m, LowRankLayer))
            return next((name for name, layer in layers if weight.stands_for(layer)), None)
        error = error.__cause__ or error.__context__
    return None
