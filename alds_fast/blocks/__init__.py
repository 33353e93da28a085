"""A network as a chain of blocks: which modules these are, and runs that begin at the end of any of them.

Here belongs what goes through a model block by block. What is done with a block belongs where it is used.
"""

from .chain import BlockChain, find_chain, kinds_of
from .discovery import check_lists, find_blocks
from .gradients import BackwardWalk
from .states import Kept, Room
from .walk import Forward, LeftChain, Reached, Walk, forwards

__all__ = [
    "BackwardWalk",
    "BlockChain",
    "Forward",
    "Kept",
    "LeftChain",
    "Reached",
    "Room",
    "Walk",
    "check_lists",
    "find_blocks",
    "find_chain",
    "forwards",
    "kinds_of",
]
