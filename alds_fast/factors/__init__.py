"""The weights of the low-rank layers for ranks that are chosen, refitted to data where there is some.

Here belongs what makes encoders and decoders. What chooses ranks belongs in allocation.
"""

from .decomposition import Choice, FactorReport, params_of
from .factorization import factorize
from .plain import plain_layers
from .refitting import refit

__all__ = [
    "Choice",
    "FactorReport",
    "factorize",
    "params_of",
    "plain_layers",
    "refit",
]
