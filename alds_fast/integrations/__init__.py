"""Formats and conventions of other libraries.

Here belongs what has to follow another library's releases. Files of this package's own belong in checkpoints.
"""

from .experts import open_experts
from .peft import teach_peft
from .peft_merging import grown_factors, warn_of_lost_merging
from .plain import to_plain
from .stored_layers import (
    METHOD,
    check_narrowed,
    fields_of_layers,
    format_version,
    layer_fields,
    layer_of_fields,
    quantization_config,
    read_layers,
    read_narrowed,
)
from .torchao import warn_of_low_rank
from .transformers_embeddings import check_resizing
from .transformers_keys import stored_names
from .transformers_quantizer import keep_when_saved, transformers_name

__all__ = [
    "METHOD",
    "check_narrowed",
    "check_resizing",
    "fields_of_layers",
    "format_version",
    "grown_factors",
    "keep_when_saved",
    "layer_fields",
    "layer_of_fields",
    "open_experts",
    "quantization_config",
    "read_layers",
    "read_narrowed",
    "stored_names",
    "teach_peft",
    "to_plain",
    "transformers_name",
    "warn_of_lost_merging",
    "warn_of_low_rank",
]
