"""How much a rank loses: spectra, criteria of weights alone, moments of data and criteria weighted by them.

Here belongs what turns a layer into errors by rank. What chooses among ranks belongs in allocation.
"""

from .errors_by_rank import MAX_DATA_GROUPS, Basis, Errors, layer_errors, with_outputs
from .layer_batches import FoldRoom, batches, computed_in_float32, for_threads, place
from .moments import (
    GRADIENTS,
    INPUTS,
    Moments,
    Wanted,
    add_up_sums,
    by_side,
    collect_by_blocks,
    collect_moments,
    distinct_rows,
    exact_products,
    fitting_mask,
    outputs,
    patches,
    rows_to_draw,
    with_few_rows,
)
from .registry import CRITERIA, DEFAULT_CRITERION, WEIGHT_CRITERIA
from .spectra import (
    Groups,
    Key,
    LayerSpectra,
    Recompute,
    candidate_groups,
    exact_spectra,
    layer_spectra,
    mark_float32,
    total_work,
    with_groups,
)
from .weighted_errors import EIGEN_NOISE, fold_matrix, slice_bases, tap_blocks
from .weights import Weighting, carried, on_filters, unknown_share, weighting

__all__ = [
    "CRITERIA",
    "DEFAULT_CRITERION",
    "EIGEN_NOISE",
    "GRADIENTS",
    "INPUTS",
    "MAX_DATA_GROUPS",
    "WEIGHT_CRITERIA",
    "Basis",
    "Errors",
    "FoldRoom",
    "Groups",
    "Key",
    "LayerSpectra",
    "Moments",
    "Recompute",
    "Wanted",
    "Weighting",
    "add_up_sums",
    "batches",
    "by_side",
    "candidate_groups",
    "carried",
    "collect_by_blocks",
    "collect_moments",
    "computed_in_float32",
    "distinct_rows",
    "exact_products",
    "exact_spectra",
    "fitting_mask",
    "fold_matrix",
    "for_threads",
    "layer_errors",
    "layer_spectra",
    "mark_float32",
    "on_filters",
    "outputs",
    "patches",
    "place",
    "rows_to_draw",
    "slice_bases",
    "tap_blocks",
    "total_work",
    "unknown_share",
    "weighting",
    "with_few_rows",
    "with_groups",
    "with_outputs",
]
