"""Comparing variants over budgets and seeds: ``evaluate``, its log, its tables and pictures.

Here belongs what runs many compressions to compare them.
"""

from .api import evaluate
from .measured_importance import measured_importance
from .table import Evaluation
from .variants import product

__all__ = [
    "Evaluation",
    "evaluate",
    "measured_importance",
    "product",
]
