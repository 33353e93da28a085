"""Comparing variants over budgets and seeds: ``evaluate``, its log, its tables and pictures.

Here belongs what runs many compressions to compare them.
"""

from .api import evaluate
from .table import Evaluation
from .variants import product

__all__ = [
    "Evaluation",
    "evaluate",
    "product",
]
