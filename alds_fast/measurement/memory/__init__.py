"""What runs of a model take of memory, beside its weights.

Here belongs how that is measured. What a plan may take belongs in planning.
"""

from .peak import Peak, peak_of_activations

__all__ = ["Peak", "peak_of_activations"]
