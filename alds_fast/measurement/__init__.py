"""Running a user's model: its inputs, its floating-point operations, its time; the model is left as it was.

Here belongs what observes models. What is decided by the observations belongs in allocation and deployment.
"""

from .data_batches import again, check_batches, explained, mask_of
from .flops import counted_inputs, dense_flops, flops_per_rank
from .inputs import InputSpec, layer_inputs, shared_inputs
from .run_model import call_model, inference, padded, preserved
from .timer import interleaved_ms, median_ratio
from .timing_cache import Ratios, Timings, device_name, environment

__all__ = [
    "InputSpec",
    "Ratios",
    "Timings",
    "again",
    "call_model",
    "check_batches",
    "counted_inputs",
    "dense_flops",
    "device_name",
    "environment",
    "explained",
    "flops_per_rank",
    "inference",
    "interleaved_ms",
    "layer_inputs",
    "mask_of",
    "median_ratio",
    "padded",
    "preserved",
    "shared_inputs",
]
