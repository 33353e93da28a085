"""The fastest form of every low-rank layer on this machine, measured: ``deploy`` and its table.

Here belongs what depends on a machine. What the model computes is the same before and after.
"""

from .api import deploy
from .autotune import whole_model_ms
from .channel_orders import with_channels_in_order
from .quantization import QuantizeTable, quantize_factors
from .table import DeployTable
from .tuned_forms import TuningTable, tune

__all__ = [
    "DeployTable",
    "QuantizeTable",
    "TuningTable",
    "deploy",
    "quantize_factors",
    "tune",
    "whole_model_ms",
    "with_channels_in_order",
]
