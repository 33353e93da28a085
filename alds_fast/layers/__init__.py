"""The low-rank modules, the layers of a model that can be decomposed, and putting one in the place of the other.

Here belongs what knows a type of layer. How errors are measured belongs in criteria, how factors are made in factors.
"""

from .absent_weight import AbsentWeight
from .base import LowRankLayer
from .conv import LowRankConv, LowRankConv1d, LowRankConv2d, LowRankConv3d
from .discovery import (
    DecomposableLayer,
    Layer,
    check_weights_are_there,
    count_bytes,
    count_params,
    decomposable,
    find_layers,
    label,
    left_out_text,
    saying_what_is_left_out,
)
from .experts import OpenedExperts, Routed, routed_rows
from .linear import LowRankLinear
from .merged_linears import MergedLinears, MergedPart
from .obstacles import (
    attributes,
    has_hooks,
    holds_experts,
    reader_reason,
    warn_of_holders,
    warn_of_questions,
    why_experts_stay,
)
from .output_heads import chosen_layers
from .registry import LOW_RANK, is_linear, low_rank_like, oriented_weight, weight_shape
from .replacement import annotate, check_copyable, replace_layers
from .shared_weights import has_plain_memory, is_freed, overlaps, tied_names
from .values import bad_values, check_values, check_weight, check_whole

__all__ = [
    "LOW_RANK",
    "AbsentWeight",
    "DecomposableLayer",
    "Layer",
    "LowRankConv",
    "LowRankConv1d",
    "LowRankConv2d",
    "LowRankConv3d",
    "LowRankLayer",
    "LowRankLinear",
    "MergedLinears",
    "MergedPart",
    "OpenedExperts",
    "Routed",
    "annotate",
    "attributes",
    "bad_values",
    "check_copyable",
    "check_values",
    "check_weight",
    "check_weights_are_there",
    "check_whole",
    "chosen_layers",
    "count_bytes",
    "count_params",
    "decomposable",
    "find_layers",
    "has_hooks",
    "has_plain_memory",
    "holds_experts",
    "is_freed",
    "is_linear",
    "label",
    "left_out_text",
    "low_rank_like",
    "oriented_weight",
    "overlaps",
    "reader_reason",
    "replace_layers",
    "routed_rows",
    "saying_what_is_left_out",
    "tied_names",
    "warn_of_holders",
    "warn_of_questions",
    "weight_shape",
    "why_experts_stay",
]
