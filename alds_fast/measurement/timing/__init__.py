"""How long calls take: sides that take turns, cold caches, and what is kept between processes.

Here belongs how times are measured. What is decided by them belongs in allocation, deployment and tuning.
"""

from .rotation import Prepared, copies_for, l2_bytes, prepare
from .timer import interleaved_ms, median_ratio, ms_by_part, paired_ratios, quartile_spread, sample_ms, steady_ms
from .timing_cache import STEADY, Ratios, Timed, Timings, device_name, environment

__all__ = [
    "STEADY",
    "Prepared",
    "Ratios",
    "Timed",
    "Timings",
    "copies_for",
    "device_name",
    "environment",
    "interleaved_ms",
    "l2_bytes",
    "median_ratio",
    "ms_by_part",
    "paired_ratios",
    "prepare",
    "quartile_spread",
    "sample_ms",
    "steady_ms",
]
