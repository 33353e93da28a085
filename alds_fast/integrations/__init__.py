"""Formats and conventions of other libraries.

Here belongs what has to follow another library's releases. Files of this package's own belong in checkpoints.
"""

from .stored_layers import METHOD, checked_layers, fields_of_layers, layer_fields, quantization_config
from .transformers_keys import stored_names
from .transformers_quantizer import keep_when_saved, transformers_name

__all__ = [
    "METHOD",
    "checked_layers",
    "fields_of_layers",
    "keep_when_saved",
    "layer_fields",
    "quantization_config",
    "stored_names",
    "transformers_name",
]
