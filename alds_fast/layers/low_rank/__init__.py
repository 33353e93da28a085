"""Low-rank forms of further types of layers.

Those of Linear and of convolutions stand in the wing itself, by whose names modules are pickled.
"""

from .conv_transpose import (
    LowRankConvTranspose,
    LowRankConvTranspose1d,
    LowRankConvTranspose2d,
    LowRankConvTranspose3d,
    swap_channels,
)
from .embedding import LowRankEmbedding, LowRankEmbeddingBag
from .int8_linear import Int8LowRankLinear

__all__ = [
    "Int8LowRankLinear",
    "LowRankConvTranspose",
    "LowRankConvTranspose1d",
    "LowRankConvTranspose2d",
    "LowRankConvTranspose3d",
    "LowRankEmbedding",
    "LowRankEmbeddingBag",
    "swap_channels",
]
