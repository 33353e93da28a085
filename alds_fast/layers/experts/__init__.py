"""Mixtures of experts of which every expert is a layer of its own, and which tokens a router gives to each.

Here belongs the module and its forward. Which modules it can take the place of belongs in obstacles, files of
transformers in integrations.
"""

from .opened import OpenedExperts
from .routed import Routed, routed_rows

__all__ = ["OpenedExperts", "Routed", "routed_rows"]
