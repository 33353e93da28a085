"""Comparing variants over budgets and seeds: ``evaluate``, its log, its tables and pictures.

Here belongs what runs many compressions to compare them.
"""

from .api import evaluate
from .cells import product
from .table import Evaluation

__all__ = [
    "Evaluation",
    "evaluate",
    "product",
]
