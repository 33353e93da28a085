"""A whole model among the cases: dense, and compressed with two calls a layer, compiled, and deployed."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from ..deployment import deploy, whole_model_ms
from ..layers import LowRankLayer, count_bytes
from ..measurement import call_model, copy_batch, count_inputs, inference, keeping_state, output_tensors, paired_ratios
from ..planning import compress
from .registered import registered_names
from .rows import NOT_COMPILED, BenchSettings, Row, check_device, compiled, floor_ms, relative_error
from .timing import error_text, summary


def _outputs(model: nn.Module, example_inputs: Any, dtype: torch.dtype | None = None) -> list[Tensor]:
    """The floating tensors of a run's output, on random numbers as they were."""

    def convert(x: Any) -> Any:
        return x.to(dtype) if dtype is not None and isinstance(x, Tensor) and x.is_floating_point() else x

    inputs = torch.utils._pytree.tree_map(convert, copy_batch(example_inputs))
    with inference(model), keeping_state(model):
        return [t for t in output_tensors(call_model(model, inputs)) if t.is_floating_point()]


def measure_model(
    model: nn.Module, example_inputs: Any, options: BenchSettings, ceilings: dict[str, Any], budget: dict[str, Any],
    compile_it: bool,
) -> Row:  # fmt: skip
    """The row of a model, compressed to ``budget``; errors are against the compressed one in float64."""
    small = compress(model, example_inputs=example_inputs, **budget)
    two_op = copy.deepcopy(small)
    for module in two_op.modules():
        if isinstance(module, LowRankLayer):
            module.backend = "two-op"
    reasons = dict.fromkeys(registered_names(), "functions of users are for single operations")
    reasons["fused"] = (
        "deployed runs each layer as it was measured to be fastest, and fused kernels on CUDA devices only"
    )
    sides: dict[str, nn.Module] = {"dense": model, "two_op": two_op}
    if compile_it:
        faster: Any = compiled(two_op, options.model_mode)
        sides["compiled"] = faster
    else:
        reasons["compiled"] = NOT_COMPILED
    sides["deployed"] = deploy(small, example_inputs)
    exact: list[Tensor] = []
    try:
        exact = _outputs(copy.deepcopy(two_op).double(), example_inputs, torch.float64)
    except Exception as e:  # a model that asks for a type of its own
        check_device(options.device, e)
        reasons["errors against float64"] = error_text(e)
    if not exact:
        reasons.setdefault("errors against float64", "its output has no floating tensors")
    errors: dict[str, Any] = {}
    for name in [name for name in sides if name != "dense"]:
        try:
            outputs = _outputs(sides[name], example_inputs)
            errors |= {name: relative_error(outputs, exact)} if exact else {}
        except Exception as e:  # whatever a compiler does not take
            check_device(options.device, e, f"{name}:")
            reasons[name] = error_text(e)
            del sides[name]
    times = whole_model_ms(sides, example_inputs, options.rounds)
    flops = [count_inputs(m, example_inputs, ())[1] for m in (model, small)]
    about = {"name": type(model).__name__, "op": "model", "flop_reduction": flops[0] / max(1, flops[1])}
    row: Row = about | {"quantiles": {}, "gains": {}, "errors": errors, "reasons": reasons, "interpreted": False}
    row |= {"error": None, "errors_ok": all(e == e for e in errors.values())}
    row["roofline_ms"] = floor_ms(count_bytes(small), flops[1], ceilings)
    for name, ms in times.items():
        row[f"{name}_ms"], *quantiles = summary(ms)
        row["quantiles"][name] = quantiles
        row["gains"][name] = list(summary(paired_ratios(times, "dense", name) if name != "dense" else [1.0] * len(ms)))
    return row
