"""The weights of the low-rank layers for ranks that are chosen, refitted to data where there is some.

Here belongs what makes encoders and decoders. What chooses ranks belongs in allocation.
"""

from .choice import Choice, FactorReport
from .distillation import Distilled, distill, names_logits, output_distance
from .factorization import factorize, weighted_layer
from .plain import plain_layers
from .refinement import PASSES, Refined, Steps, check_chain, passes_of, refine, refine_blocks
from .refitting import BATCHNORMS, Gradient, refit
from .training import check_schedule, check_wide, trained_reports
from .widths import FewerUnits, NarrowMoments, narrow_layers, narrow_model, read_spans, rows_kept, spans_text

__all__ = [
    "BATCHNORMS",
    "PASSES",
    "Choice",
    "Distilled",
    "FactorReport",
    "FewerUnits",
    "Gradient",
    "NarrowMoments",
    "Refined",
    "Steps",
    "check_chain",
    "check_schedule",
    "check_wide",
    "distill",
    "factorize",
    "names_logits",
    "narrow_layers",
    "narrow_model",
    "output_distance",
    "passes_of",
    "plain_layers",
    "read_spans",
    "refine",
    "refine_blocks",
    "refit",
    "rows_kept",
    "spans_text",
    "trained_reports",
    "weighted_layer",
]
