"""Dense, factorised and fused layers side by side on the machine at hand: ``benchmark``, and ``register`` for yours.

Here belongs what times operations for people. Timings that the library decides by belong in measurement and deployment.
"""

from .api import benchmark
from .benchmark import Benchmark
from .cases import Operation
from .registered import add_way as register
from .rows import NOT_COMPILED, BenchSettings, DeviceLost, check_device, compiled, interpreted, measure, settings
from .timing import ceilings, error_text, interleaved, release, synchronize

__all__ = [
    "NOT_COMPILED",
    "BenchSettings",
    "Benchmark",
    "DeviceLost",
    "Operation",
    "benchmark",
    "ceilings",
    "check_device",
    "compiled",
    "error_text",
    "interleaved",
    "interpreted",
    "measure",
    "register",
    "release",
    "settings",
    "synchronize",
]
