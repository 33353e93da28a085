"""Compressing a checkpoint that need not fit in memory, resumed after interruptions: ``compress_checkpoint``.

Here belongs what works through a checkpoint a part at a time. Formats of files belong in checkpoints itself.
"""

from .api import CompressedCheckpoint, compress_checkpoint
from .meta_model import config_of

__all__ = [
    "CompressedCheckpoint",
    "compress_checkpoint",
    "config_of",
]
