"""Comparing variants over budgets and seeds: ``evaluate``, its log, its tables and pictures; two models: ``report``.

Here belongs what runs many compressions to compare them.
"""

from .api import evaluate
from .comparison import Report, report
from .measured_importance import measured_importance
from .plot import COLOURS
from .saving import Saved
from .table import Evaluation
from .variants import product

__all__ = [
    "COLOURS",
    "Evaluation",
    "Report",
    "Saved",
    "evaluate",
    "measured_importance",
    "product",
    "report",
]
