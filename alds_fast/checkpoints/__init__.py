"""Models in files: ``save`` and ``load``, checkpoint directories of transformers, compressed a part at a time.

Here belongs what reads and writes models. What other libraries prescribe belongs in integrations.
"""

from .analyses import load_analysis, save_analysis
from .file_format import read_header
from .pretrained import PLAN, compressed_layers, from_pretrained, plan_of_directory
from .safetensors_reader import INDEX, Shards, open_shards
from .safetensors_writer import Entry, write_shard
from .save_load import assign, load, model_file, rebuild, save, structure, unique_tensors
from .streaming import CompressedCheckpoint, compress_checkpoint, config_of
from .with_data import one_block_at_a_time

__all__ = [
    "INDEX",
    "PLAN",
    "CompressedCheckpoint",
    "Entry",
    "Shards",
    "assign",
    "compress_checkpoint",
    "compressed_layers",
    "config_of",
    "from_pretrained",
    "load",
    "load_analysis",
    "model_file",
    "one_block_at_a_time",
    "open_shards",
    "plan_of_directory",
    "read_header",
    "rebuild",
    "save",
    "save_analysis",
    "structure",
    "unique_tensors",
    "write_shard",
]
