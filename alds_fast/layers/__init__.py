"""The low-rank modules, the layers of a model that can be decomposed, and putting one in the place of the other.

Here belongs what knows a type of layer. How errors are measured belongs in criteria, how factors are made in factors.
"""

from .annotations import annotate
from .base import LowRankLayer
from .conv import LowRankConv1d, LowRankConv2d, LowRankConv3d
from .discovery import (
    DecomposableLayer,
    Layer,
    check_weight,
    count_params,
    decomposable,
    find_layers,
    has_hooks,
    label,
    patterns,
)
from .linear import LowRankLinear
from .merged_linears import MergedLinears, MergedPart
from .output_heads import chosen_layers
from .registry import LOW_RANK, is_linear, low_rank_like, oriented_weight, weight_shape
from .replacement import replace_layers
from .shared_weights import overlaps, tied_names

__all__ = [
    "LOW_RANK",
    "DecomposableLayer",
    "Layer",
    "LowRankConv1d",
    "LowRankConv2d",
    "LowRankConv3d",
    "LowRankLayer",
    "LowRankLinear",
    "MergedLinears",
    "MergedPart",
    "annotate",
    "check_weight",
    "chosen_layers",
    "count_params",
    "decomposable",
    "find_layers",
    "has_hooks",
    "is_linear",
    "label",
    "low_rank_like",
    "oriented_weight",
    "overlaps",
    "patterns",
    "replace_layers",
    "tied_names",
    "weight_shape",
]
