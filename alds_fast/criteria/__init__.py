"""How much a rank loses: spectra, criteria of weights alone, moments of data and criteria weighted by them.

Here belongs what turns a layer into errors by rank. What chooses among ranks belongs in allocation.
"""

from .errors_by_rank import MAX_DATA_GROUPS, Basis, Errors, layer_errors, with_outputs
from .input_rows import Wanted, fitting_mask, outputs, patches
from .layer_batches import FoldRoom, batches, computed_in_float32, for_threads, place
from .moment_hooks import rows_wanted
from .moment_sums import exact_products
from .moments import Moments, Sensitivity, collect_moments
from .registry import CRITERIA, DEFAULT_CRITERION, WEIGHT_CRITERIA
from .spectra import (
    Groups,
    Key,
    LayerSpectra,
    Recompute,
    candidate_groups,
    exact_spectra,
    layer_spectra,
    marked_float32,
    total_work,
    with_groups,
)
from .weighted_errors import EIGEN_NOISE, folded, slice_bases, tap_blocks
from .weights import Weighting, weighting

__all__ = [
    "CRITERIA",
    "DEFAULT_CRITERION",
    "EIGEN_NOISE",
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
    "Sensitivity",
    "Wanted",
    "Weighting",
    "batches",
    "candidate_groups",
    "collect_moments",
    "computed_in_float32",
    "exact_products",
    "exact_spectra",
    "fitting_mask",
    "folded",
    "for_threads",
    "layer_errors",
    "layer_spectra",
    "marked_float32",
    "outputs",
    "patches",
    "place",
    "rows_wanted",
    "slice_bases",
    "tap_blocks",
    "total_work",
    "weighting",
    "with_groups",
    "with_outputs",
]
