"""Running a user's model: its inputs, its floating-point operations, its time and memory; the model is left as it was.

Here belongs what observes models. What is decided by the observations belongs in allocation and deployment.
"""

from .data_batches import check_batches, check_data, first_batch, naming_batch, numbered_batches, without_labels
from .flops import count_inputs, dense_flops, flops_of_ranks
from .inputs import InputSpec, layer_inputs, shared_inputs
from .masks import USUAL, Masks, masks_of
from .memory import Peak, peak_of_activations
from .output_gradients import (
    KL,
    Sensitivity,
    backward_from,
    check_sensitivity,
    first_floating,
    named_logits,
    signs_of,
)
from .private_runs import MAPPED, Run, check_runs, copy_batch, keeping_state, private_runs
from .run_model import (
    attribute_set,
    call_model,
    device_of,
    exact_products,
    first_input,
    inference,
    output_tensors,
    without_fast_paths,
)
from .samples import Samples, digest_of, leaves_of
from .timer import interleaved_ms, median_ratio, ms_by_part, paired_ratios, quartile_spread, sample_ms, steady_ms
from .timing_cache import STEADY, Ratios, Timed, Timings, device_name, environment
from .watched_run import LayerCall, Watch, as_written, fingerprint, watching, weight_readers

__all__ = [
    "KL",
    "MAPPED",
    "STEADY",
    "USUAL",
    "InputSpec",
    "LayerCall",
    "Masks",
    "Peak",
    "Ratios",
    "Run",
    "Samples",
    "Sensitivity",
    "Timed",
    "Timings",
    "Watch",
    "as_written",
    "attribute_set",
    "backward_from",
    "call_model",
    "check_batches",
    "check_data",
    "check_runs",
    "check_sensitivity",
    "copy_batch",
    "count_inputs",
    "dense_flops",
    "device_name",
    "device_of",
    "digest_of",
    "environment",
    "exact_products",
    "fingerprint",
    "first_batch",
    "first_floating",
    "first_input",
    "flops_of_ranks",
    "inference",
    "interleaved_ms",
    "keeping_state",
    "layer_inputs",
    "leaves_of",
    "masks_of",
    "median_ratio",
    "ms_by_part",
    "named_logits",
    "naming_batch",
    "numbered_batches",
    "output_tensors",
    "paired_ratios",
    "peak_of_activations",
    "private_runs",
    "quartile_spread",
    "sample_ms",
    "shared_inputs",
    "signs_of",
    "steady_ms",
    "watching",
    "weight_readers",
    "without_fast_paths",
    "without_labels",
]
