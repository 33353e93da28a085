"""From a model to a plan to a compressed model: ``analyze``, ``Analysis``, ``Plan``, ``compress``.

Here belongs what ties the steps together and checks users' options. The steps themselves belong in the wings before.
"""

from .analysis import Analysis
from .compression import check_refinement, compress
from .defaults import check_is_possible, resolved_norm, resolved_precision
from .options import METHODS, check_groups, check_plan_options, check_schemes, is_float32
from .plan import Plan
from .plan_rows import LayerPlan
from .plots import analysis_dict, check_plot, plot_plan
from .run_analysis import Progress, analyze, tell_nobody

__all__ = [
    "METHODS",
    "Analysis",
    "LayerPlan",
    "Plan",
    "Progress",
    "analysis_dict",
    "analyze",
    "check_groups",
    "check_is_possible",
    "check_plan_options",
    "check_plot",
    "check_refinement",
    "check_schemes",
    "compress",
    "is_float32",
    "plot_plan",
    "resolved_norm",
    "resolved_precision",
    "tell_nobody",
]
