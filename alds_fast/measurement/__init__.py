"""Running a user's model: its inputs, its floating-point operations, its time; the model is left as it was.

Here belongs what observes models. What is decided by the observations belongs in allocation and deployment.
"""

from .flops import counted_inputs, dense_flops, flops_per_rank
from .inputs import InputSpec, layer_inputs, shared_inputs
from .run_model import call_model, inference, interleaved_ms, median_ratio, padded, preserved
from .timing_cache import Ratios, Timings, device_name, environment, write_text

__all__ = [
    "InputSpec",
    "Ratios",
    "Timings",
    "call_model",
    "counted_inputs",
    "dense_flops",
    "device_name",
    "environment",
    "flops_per_rank",
    "inference",
    "interleaved_ms",
    "layer_inputs",
    "median_ratio",
    "padded",
    "preserved",
    "shared_inputs",
    "write_text",
]
