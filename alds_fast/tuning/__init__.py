"""Tilings of the fused kernels, found by measurement on the device where they run.

Here belong the search space, the model that prunes it and the search. What a launch then takes is in kernels/tilings.
"""

from .gpu import Gpu
from .search import FusedCall, TunedRow, tune_calls

__all__ = ["FusedCall", "Gpu", "TunedRow", "tune_calls"]
