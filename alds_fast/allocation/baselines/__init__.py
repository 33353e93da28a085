"""Published methods to compare with, one file each; ``BASELINES`` has them by name.

Here belongs a method that others published. What this package uses by default belongs in allocation itself.
"""

from .filter_pruning import filter_threshold
from .rules import BASELINES, ONE_SLICE

__all__ = [
    "BASELINES",
    "ONE_SLICE",
    "filter_threshold",
]
