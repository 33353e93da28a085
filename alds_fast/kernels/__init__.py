"""Fused low-rank kernels: functions in :mod:`~alds_fast.kernels.functional`, their plain form in ``reference``.

Here belong operators on tensors and the choice between the fused and the plain form. Modules that call them belong in
layers.
"""

from .arguments import BACKENDS
from .backend import HAS_TRITON, decisions, why_not_fused_conv2d, why_not_fused_linear, why_not_fused_linears
from .functional import lowrank_conv2d, lowrank_linear, lowrank_linears
from .limits import MAX_MERGED
from .op_shared import counters_given_back
from .reference import dequantized, in_this_order, lowrank_linear_ref, quantized_rows
from .tilings import (
    ConvKey,
    DecodeKey,
    EncodeKey,
    LaunchKey,
    LinearKey,
    Measured,
    Tiling,
    asked,
    can_go_by_rows,
    capability_of,
    compiling_for,
    keep_tilings,
    measured,
    using,
)

__all__ = [
    "BACKENDS",
    "HAS_TRITON",
    "MAX_MERGED",
    "ConvKey",
    "DecodeKey",
    "EncodeKey",
    "LaunchKey",
    "LinearKey",
    "Measured",
    "Tiling",
    "asked",
    "can_go_by_rows",
    "capability_of",
    "compiling_for",
    "counters_given_back",
    "decisions",
    "dequantized",
    "in_this_order",
    "keep_tilings",
    "lowrank_conv2d",
    "lowrank_linear",
    "lowrank_linear_ref",
    "lowrank_linears",
    "measured",
    "quantized_rows",
    "using",
    "why_not_fused_conv2d",
    "why_not_fused_linear",
    "why_not_fused_linears",
]
