"""From a model to a plan to a compressed model: ``analyze``, ``Analysis``, ``Plan``, ``compress``.

Here belongs what ties the steps together and checks users' options. The steps themselves belong in the wings before.
"""

from .analysis import Analysis
from .compression import check_refinement, compress
from .findings import Sweep, measured_quality, smallest_of_quality
from .options import (
    METHODS,
    Pin,
    budget_amount,
    check_groups,
    check_is_possible,
    check_needs,
    check_plan_options,
    check_schemes,
    is_float32,
    pins_of_layers,
    read_pins,
    resolved_norm,
    resolved_precision,
)
from .plan import Plan
from .plan_rows import LayerPlan
from .plan_texts import kinds_text
from .plots import analysis_dict, check_plot, plot_plan, plot_sweep
from .run_analysis import analyze

__all__ = [
    "METHODS",
    "Analysis",
    "LayerPlan",
    "Pin",
    "Plan",
    "Sweep",
    "analysis_dict",
    "analyze",
    "budget_amount",
    "check_groups",
    "check_is_possible",
    "check_needs",
    "check_plan_options",
    "check_plot",
    "check_refinement",
    "check_schemes",
    "compress",
    "is_float32",
    "kinds_text",
    "measured_quality",
    "pins_of_layers",
    "plot_plan",
    "plot_sweep",
    "read_pins",
    "resolved_norm",
    "resolved_precision",
    "smallest_of_quality",
]
