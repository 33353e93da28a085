"""What stands in the way of a replacement: reasons of single layers, and what hangs on a model.

Here belongs what is looked at before a layer is replaced. Finding layers belongs in ``discovery``, copying in
``replacement``.
"""

from .attributes import attributes, held_past_the_model, uncopied, warn_of_holders, warn_of_unregistered
from .reasons import (
    SHARDED,
    Ancestors,
    has_hooks,
    is_quantised,
    reader_reason,
    reason_around,
    reason_of_hooks,
    reasons_text,
    structural_reason,
    why_experts_stay,
)
from .stacked_experts import holds_experts, oriented_experts, projections
from .weight_reads import readers, warn_of_questions

__all__ = [
    "SHARDED",
    "Ancestors",
    "attributes",
    "has_hooks",
    "held_past_the_model",
    "holds_experts",
    "is_quantised",
    "oriented_experts",
    "projections",
    "reader_reason",
    "readers",
    "reason_around",
    "reason_of_hooks",
    "reasons_text",
    "structural_reason",
    "uncopied",
    "warn_of_holders",
    "warn_of_questions",
    "warn_of_unregistered",
    "why_experts_stay",
]
