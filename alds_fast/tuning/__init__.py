"""Tilings of the fused kernels, found by measurement on the device where they run.

Here belong the search space, the model that prunes it and the search. What a launch then takes is in kernels/tilings.
"""

from .candidates import launch_candidates
from .cost import seconds_of
from .gpu import Gpu
from .rates import A100, H100, Rates
from .search import FusedCall, TunedRow, tune_calls

__all__ = ["A100", "H100", "FusedCall", "Gpu", "Rates", "TunedRow", "launch_candidates", "seconds_of", "tune_calls"]
