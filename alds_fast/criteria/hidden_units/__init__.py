"""Hidden units, outputs of some linear layers and inputs of one: which there are, and what removing them costs.

Here belongs what knows groups of layers around hidden units. How many units stay belongs in planning.
"""

from .finding import HiddenUnits, find_hidden_units
from .removal import compensated, kept_units, removal_errors, removal_order

__all__ = ["HiddenUnits", "compensated", "find_hidden_units", "kept_units", "removal_errors", "removal_order"]
