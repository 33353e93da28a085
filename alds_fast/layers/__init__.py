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
from .low_rank import (
    Int8LowRankLinear,
    LowRankConvTranspose,
    LowRankConvTranspose1d,
    LowRankConvTranspose2d,
    LowRankConvTranspose3d,
    LowRankEmbedding,
    LowRankEmbeddingBag,
)
from .merged_linears import MergedLinears, MergedPart
from .obstacles import (
    attributes,
    has_hooks,
    holds_experts,
    reader_reason,
    warn_of_holders,
    warn_of_questions,
    warn_of_unregistered,
    why_experts_stay,
)
from .opening import REGISTERED, OpenedAttention, opened, opened_for, put_opened, register
from .output_heads import chosen_layers
from .registry import (
    CONVOLUTIONS,
    LOW_RANK,
    dense_shape,
    filters_first,
    is_linear,
    is_narrowed,
    is_table,
    low_rank_like,
    oriented_weight,
    weight_shape,
)
from .replacement import annotate, check_copyable, replace_layers
from .shared_weights import has_plain_memory, is_freed, overlaps, tied_names
from .values import bad_values, check_values, check_weight, check_whole
from .widths import as_narrowed, is_plain_linear, narrow_layer, narrowed_sizes, padded, put_narrowed, with_sizes

__all__ = [
    "CONVOLUTIONS",
    "LOW_RANK",
    "REGISTERED",
    "AbsentWeight",
    "DecomposableLayer",
    "Int8LowRankLinear",
    "Layer",
    "LowRankConv",
    "LowRankConv1d",
    "LowRankConv2d",
    "LowRankConv3d",
    "LowRankConvTranspose",
    "LowRankConvTranspose1d",
    "LowRankConvTranspose2d",
    "LowRankConvTranspose3d",
    "LowRankEmbedding",
    "LowRankEmbeddingBag",
    "LowRankLayer",
    "LowRankLinear",
    "MergedLinears",
    "MergedPart",
    "OpenedAttention",
    "OpenedExperts",
    "Routed",
    "annotate",
    "as_narrowed",
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
    "dense_shape",
    "filters_first",
    "find_layers",
    "has_hooks",
    "has_plain_memory",
    "holds_experts",
    "is_freed",
    "is_linear",
    "is_narrowed",
    "is_plain_linear",
    "is_table",
    "label",
    "left_out_text",
    "low_rank_like",
    "narrow_layer",
    "narrowed_sizes",
    "opened",
    "opened_for",
    "oriented_weight",
    "overlaps",
    "padded",
    "put_narrowed",
    "put_opened",
    "reader_reason",
    "register",
    "replace_layers",
    "routed_rows",
    "saying_what_is_left_out",
    "tied_names",
    "warn_of_holders",
    "warn_of_questions",
    "warn_of_unregistered",
    "weight_shape",
    "why_experts_stay",
    "with_sizes",
]
