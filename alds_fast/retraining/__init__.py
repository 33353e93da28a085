"""Training before and after compression, in cycles, resumed after interruptions: ``retrain``.

Here belongs what trains. What a cycle compresses with belongs in planning.
"""

from .api import Retrained, retrain

__all__ = [
    "Retrained",
    "retrain",
]
