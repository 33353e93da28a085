"""Formats and conventions of other libraries.

Here belongs what has to follow another library's releases. Files of this package's own belong in checkpoints.
"""

from .peft import grown_factors
from .plain import to_plain
from .torchao import warn_of_low_rank
from .transformers_embeddings import check_resizing
from .transformers_keys import stored_names
from .transformers_quantizer import METHOD, VERSION, checked_layers, keep_when_saved, layer_config, transformers_format

__all__ = [
    "METHOD",
    "VERSION",
    "check_resizing",
    "checked_layers",
    "grown_factors",
    "keep_when_saved",
    "layer_config",
    "stored_names",
    "to_plain",
    "transformers_format",
    "warn_of_low_rank",
]
