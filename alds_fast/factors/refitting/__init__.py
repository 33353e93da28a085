"""Factors fitted anew to what reaches each layer in the compressed network.

Here belongs what makes factors from two networks that are run side by side. What trains them is refinement.
"""

from .batchnorm import BATCHNORMS
from .refit import Gradient, refit

__all__ = ["BATCHNORMS", "Gradient", "refit"]
