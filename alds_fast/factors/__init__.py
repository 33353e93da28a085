"""The weights of the low-rank layers for ranks that are chosen, refitted to data where there is some.

Here belongs what makes encoders and decoders. What chooses ranks belongs in allocation.
"""

from .batchnorm import BATCHNORMS
from .choice import Choice, FactorReport
from .factorization import factorize, weighted_layer
from .plain import plain_layers
from .refinement import Refined, refine
from .refitting import Gradient, refit

__all__ = [
    "BATCHNORMS",
    "Choice",
    "FactorReport",
    "Gradient",
    "Refined",
    "factorize",
    "plain_layers",
    "refine",
    "refit",
    "weighted_layer",
]
