"""Plans that remove hidden units beside lowering ranks.

Here belongs how many units stay, and what the plan then says. How the layers are made belongs in factors.
"""

from .search import WidthSearch

__all__ = ["WidthSearch"]
