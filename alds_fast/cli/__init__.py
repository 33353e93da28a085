"""The command ``alds-fast``.

Here belong arguments and output of the command line. What a command does belongs in the wings before.
"""

from .commands import main

__all__ = [
    "main",
]
