"""Published methods to compare with, one file each; ``BASELINES`` has them by name.

Here belongs a method that others published. What this package uses by default belongs in allocation itself.
"""

from .filter_pruning import filter_threshold
from .registry import BASELINES

__all__ = [
    "BASELINES",
    "filter_threshold",
]
