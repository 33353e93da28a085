"""Training before and after compression, in cycles, resumed after interruptions: ``retrain``.

Here belongs what trains, and the text that is trained on. What a cycle compresses with belongs in planning.
"""

from .api import Retrained, retrain
from .own_text import own_text

__all__ = [
    "Retrained",
    "own_text",
    "retrain",
]
