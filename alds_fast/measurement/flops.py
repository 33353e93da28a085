"""Floating-point operations of layers and of everything that could replace them, counted as torch counts them.

A multiplication and an addition are two operations; biases, activations and normalisations count nothing. The numbers
are those of ``torch.utils.flop_counter.FlopCounterMode`` on the compressed model, exactly, and what it leaves out:
recurrent layers and, on the CPU, scaled dot-product attention.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import torch
from torch import nn

from ..layers import LowRankLayer, is_table
from ..linalg import Decomposition, WeightShape, decoder_axes, saved_by_pivots
from .inputs import InputSpec, layer_inputs
from .run_model import without_fast_paths

Shape = tuple[int, ...]


def _attention(query: Shape, key: Shape, value: Shape, *_: Any, **__: Any) -> int:
    """Scores, and their sums of values; each is (batch, heads, positions, width)."""
    return 2 * math.prod(query[:-1]) * key[-2] * (query[-1] + value[-1])


def _recurrent(x: Shape, weights: Iterable[Shape]) -> int:
    """The products of every step with all matrices among the weights; x is (..., features)."""
    return 2 * math.prod(x[:-1]) * sum(math.prod(w) for w in weights if len(w) == 2)


def _not_counted_by_torch() -> dict[Any, Any]:
    """Formulas of operators for which torch has none."""
    aten = torch.ops.aten
    formulas = {
        "_scaled_dot_product_flash_attention_for_cpu": _attention,
        "mkldnn_rnn_layer": lambda x, w_input, w_hidden, *_, **__: _recurrent(x, (w_input, w_hidden)),
        "_cudnn_rnn": lambda x, weights, *_, **__: _recurrent(x, weights),
    }
    return {getattr(aten, name): formula for name, formula in formulas.items() if hasattr(aten, name)}


def count_inputs(
    model: nn.Module, example_inputs: Any, names: Iterable[str]
) -> tuple[dict[str, dict[InputSpec, int]], int]:
    """:func:`alds_fast.measurement.layer_inputs`, and the floating-point operations of that same run of the model.

    (torch's transformer layers and attention are kept off their fused inference paths, in which torch counts nothing.)
    """
    from torch.utils.flop_counter import FlopCounterMode  # it imports triton

    with without_fast_paths(), FlopCounterMode(display=False, custom_mapping=_not_counted_by_torch()) as counter:
        inputs = layer_inputs(model, example_inputs, names)
    return inputs, int(counter.get_total_flops())


def _output_size(size: int, axis: int, module: nn.Module) -> int:
    """Length of an axis after a convolution along it."""
    conv: Any = module
    reach = conv.dilation[axis] * (conv.kernel_size[axis] - 1)
    if conv.transposed:
        return int((size - 1) * conv.stride[axis] - 2 * conv.padding[axis] + reach + conv.output_padding[axis] + 1)
    padding = conv.padding if isinstance(conv.padding, str) else 2 * conv.padding[axis]
    added = {"same": reach, "valid": 0}.get(padding, padding)
    return int((size + added - reach - 1) // conv.stride[axis] + 1)


def _sites(module: nn.Module, shape: WeightShape, spec: InputSpec, scheme: int | None) -> tuple[int, int]:
    """Places where the two layers' weights are applied: positions after the encoder and after the decoder.

    For ``scheme`` None the positions after the dense layer, twice. Transposed layers apply theirs where they get them:
    positions before the encoder, between both, and before the dense layer.
    """
    axes = len(shape.kernel)
    if is_table(module):
        return 0, math.prod(spec.shape[: 1 if isinstance(module, nn.EmbeddingBag) else None])
    if axes == 0:
        rows = math.prod(spec.shape[:-1])
        return rows, rows
    batch = spec.shape[0] if len(spec.shape) == axes + 2 else 1
    sizes = spec.shape[len(spec.shape) - axes :]
    done = [_output_size(n, a, module) for a, n in enumerate(sizes)]
    late = () if scheme is None else decoder_axes(scheme, shape.kernel)
    between = [sizes[a] if a in late else done[a] for a in range(axes)]
    if module.transposed:
        return batch * math.prod(sizes), batch * math.prod(sizes if scheme is None else between)
    return batch * math.prod(between), batch * math.prod(done)


def dense_flops(module: nn.Module, shape: WeightShape, calls: Mapping[InputSpec, int]) -> int:
    """Operations of the layer as it is over all its calls: of a dense one 2 numel(W) per position of the output.

    Per position of the input of a transposed one.
    """
    if is_table(module) and not isinstance(module, LowRankLayer):
        return 0
    if isinstance(module, LowRankLayer):
        return int(flops_of_ranks(module, shape, calls, module.decomposition, np.array([module.rank]))[0])
    return sum(count * 2 * shape.numel * _sites(module, shape, spec, None)[1] for spec, count in calls.items())


def flops_of_ranks(
    module: nn.Module, shape: WeightShape, calls: Mapping[InputSpec, int], form: Decomposition, ranks: np.ndarray
) -> np.ndarray:
    """Operations over all calls of decompositions of these ranks, of the fold, slices and pivots of ``form``.

    For a rank r, 2 (c k_enc) r per position after the encoder and 2 (groups f k_dec) r per position of the output, for
    every one of the ``conv_groups`` independent layers of f filters and c channels. Output pivots take r filters off
    the decoder, input pivots r channels of every slice off the encoder.
    """
    decoder = math.prod(shape.kernel[a] for a in decoder_axes(form.scheme, shape.kernel))
    per_encoder_site = shape.in_channels * (math.prod(shape.kernel) // decoder) * ranks
    per_decoder_site = form.groups * shape.out_channels * decoder * ranks
    saved = saved_by_pivots(shape, form.groups, ranks)
    if form.pivots == "output":
        per_decoder_site = per_decoder_site - saved
    if form.pivots == "input":
        per_encoder_site = per_encoder_site - saved
    total = np.zeros_like(ranks)
    for spec, count in calls.items():
        between, after = _sites(module, shape, spec, form.scheme)
        total += count * 2 * (per_encoder_site * between + per_decoder_site * after)
    return total
