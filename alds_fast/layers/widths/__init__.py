"""Linear layers that lost a part of their outputs or inputs, the hidden units between two layers.

Here belongs what such layers are. Which units go belongs in criteria, how many in planning.
"""

from .narrowed import as_narrowed, is_plain_linear, narrow_layer, narrowed_sizes, padded, put_narrowed, with_sizes

__all__ = ["as_narrowed", "is_plain_linear", "narrow_layer", "narrowed_sizes", "padded", "put_narrowed", "with_sizes"]
