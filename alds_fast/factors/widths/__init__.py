"""A model with fewer hidden units: its layers, and what data say of them.

Here belongs what makes narrower layers. Which units there are belongs in criteria, how many stay in planning.
"""

from .narrowing import FewerUnits, NarrowMoments, narrow_layers, narrow_model, rows_kept
from .spans import read_spans, spans_text

__all__ = ["FewerUnits", "NarrowMoments", "narrow_layers", "narrow_model", "read_spans", "rows_kept", "spans_text"]
