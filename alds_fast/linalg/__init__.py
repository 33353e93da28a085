"""Matrices: how a weight folds into them, their spectra, their low-rank factors; in C++ and in torch.

Here belongs what takes tensors and returns tensors. What knows of modules belongs in layers, what scores ranks in
criteria. The C++ extension is ``_core``.
"""

from .decomposition import Decomposition
from .folding import (
    SCHEMES,
    WeightShape,
    decoder_axes,
    decoder_weight,
    distinct_schemes,
    divisors,
    factors_to_weights,
    matrix_shape,
    max_rank,
    params_per_rank,
    permute_weight,
    slice_factors,
    unfold,
    weights_to_dense,
)
from .own_memory import own_memory
from .pivots import Pivots, index_count, pivot_factors, pivots_of_fold, saved_by_pivots, with_identity
from .products import cut_product, product_values
from .rsvd_op import batched_rsvd
from .spectra_op import spectra
from .torch_backend import EXACT_BY_FALLBACK, Factors, cholesky_in_place, optimal_errors, solve_each

__all__ = [
    "EXACT_BY_FALLBACK",
    "SCHEMES",
    "Decomposition",
    "Factors",
    "Pivots",
    "WeightShape",
    "batched_rsvd",
    "cholesky_in_place",
    "cut_product",
    "decoder_axes",
    "decoder_weight",
    "distinct_schemes",
    "divisors",
    "factors_to_weights",
    "index_count",
    "matrix_shape",
    "max_rank",
    "optimal_errors",
    "own_memory",
    "params_per_rank",
    "permute_weight",
    "pivot_factors",
    "pivots_of_fold",
    "product_values",
    "saved_by_pivots",
    "slice_factors",
    "solve_each",
    "spectra",
    "unfold",
    "weights_to_dense",
    "with_identity",
]
