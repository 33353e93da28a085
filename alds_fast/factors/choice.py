"""What is chosen for a layer, and how its factors were computed."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

from ..linalg import Decomposition, WeightShape


class Choice(NamedTuple):
    """A layer by name, the weight shape it must have, and its decomposition."""

    name: str
    shape: WeightShape
    decomposition: Decomposition


@dataclass(frozen=True)
class FactorReport:
    """How one layer's factors were computed.

    ``method``: "randomized" (certificate met), "exact" (chosen, a sketch would cost more), "exact-fallback" (some
    slice's sketch did not meet its certificate), "weighted" (by the data's moments), "refitted" (to what reaches the
    layer in the compressed network), "refined" or "distilled" (trained to what the dense model's block, or the dense
    model, returns); ``iterations``: most power iterations over the slices; ``error``:
    ||W - W_hat||_F / ||W||_F before rounding to the weight's type; ``data_error``: the relative error reached on the
    data by the plan's criterion, or, if refitted, of the layer's output against the dense network's; NaN without.
    """

    method: str
    iterations: int
    error: float
    data_error: float = math.nan
