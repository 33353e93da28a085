"""What layers see of data: second moments of their inputs and of the gradients at their outputs.

Here belongs what runs a model to sum up rows. What is made of the sums belongs in criteria itself.
"""

from .by_blocks import GRADIENTS, INPUTS, collect_by_blocks
from .by_processes import add_up_sums
from .collection import Moments, collect_moments
from .held_rows import MOST_ROWS
from .hooks import moment_forms, rows_to_draw
from .rows import Wanted, by_side, fitting_mask, outputs, patches
from .sums import distinct_rows, in_float64, mirror, plain_rows, triangle, with_few_rows

__all__ = [
    "GRADIENTS",
    "INPUTS",
    "MOST_ROWS",
    "Moments",
    "Wanted",
    "add_up_sums",
    "by_side",
    "collect_by_blocks",
    "collect_moments",
    "distinct_rows",
    "fitting_mask",
    "in_float64",
    "mirror",
    "moment_forms",
    "outputs",
    "patches",
    "plain_rows",
    "rows_to_draw",
    "triangle",
    "with_few_rows",
]
