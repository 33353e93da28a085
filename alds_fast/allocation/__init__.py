"""Which rank every layer gets: candidates, the exact solvers of budgets, latency, and the published baselines.

Here belongs what chooses among errors and costs. What a user's options mean belongs in planning.
"""

from .baselines import BASELINES, filter_threshold
from .candidates import Candidates, candidates, least_error_of_pivots
from .costs import (
    SHARES,
    Calls,
    CostTable,
    amount_text,
    corrected_limit,
    flops_table,
    memory_table,
    params_table,
    relax,
)
from .float32_check import curves_in_doubt, with_exact_values
from .latency import MAX_LATENCY_GROUPS, LayerTimes, end_to_end, random_model
from .one_budget import allocate
from .pareto import Front, Ints, p_norm, pareto_front
from .slice_pruning import auto_groups, prune_spectra
from .solver import Solution, dense_reason, largest_error, solve, solve_baseline, solve_error
from .widths import Width, widths_at_one_price

__all__ = [
    "BASELINES",
    "MAX_LATENCY_GROUPS",
    "SHARES",
    "Calls",
    "Candidates",
    "CostTable",
    "Front",
    "Ints",
    "LayerTimes",
    "Solution",
    "Width",
    "allocate",
    "amount_text",
    "auto_groups",
    "candidates",
    "corrected_limit",
    "curves_in_doubt",
    "dense_reason",
    "end_to_end",
    "filter_threshold",
    "flops_table",
    "largest_error",
    "least_error_of_pivots",
    "memory_table",
    "p_norm",
    "params_table",
    "pareto_front",
    "prune_spectra",
    "random_model",
    "relax",
    "solve",
    "solve_baseline",
    "solve_error",
    "widths_at_one_price",
    "with_exact_values",
]
