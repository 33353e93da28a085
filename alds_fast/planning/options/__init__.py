"""What users ask for: checks of options, what stands for those that are not given, and pins of single layers.

Here belongs what an option means. What is done about it belongs in the files of planning.
"""

from .checks import (
    METHODS,
    budget_amount,
    check_groups,
    check_held_out,
    check_moment_memory,
    check_plan_options,
    check_quality,
    check_refining,
    check_schemes,
    is_float32,
    refuse_unknown,
)
from .defaults import (
    check_is_possible,
    check_needs,
    keeps_constants,
    resolved_criterion,
    resolved_norm,
    resolved_precision,
    tell_too_little,
)
from .pins import Pin, choices_of, importance_of_layers, pins_of_layers, read_pins, saying_what_is_pinned
from .registered import check_registered
from .typed import AnalysisOptions, CompressOptions, PlanOptions

__all__ = [
    "METHODS",
    "AnalysisOptions",
    "CompressOptions",
    "Pin",
    "PlanOptions",
    "budget_amount",
    "check_groups",
    "check_held_out",
    "check_is_possible",
    "check_moment_memory",
    "check_needs",
    "check_plan_options",
    "check_quality",
    "check_refining",
    "check_registered",
    "check_schemes",
    "choices_of",
    "importance_of_layers",
    "is_float32",
    "keeps_constants",
    "pins_of_layers",
    "read_pins",
    "refuse_unknown",
    "resolved_criterion",
    "resolved_norm",
    "resolved_precision",
    "saying_what_is_pinned",
    "tell_too_little",
]
