"""Checkpoint directories compressed by what their layers see of data, one block's weights and moments at a time.

Here belongs what runs the models of a job. What plans and writes without a run belongs in streaming itself.
"""

from .mapped import one_block_at_a_time
from .seen import WithData

__all__ = [
    "WithData",
    "one_block_at_a_time",
]
