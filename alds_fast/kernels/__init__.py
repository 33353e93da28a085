"""Fused low-rank kernels: functions in :mod:`~alds_fast.kernels.dispatch`, their plain form in ``reference``."""

from .checks import BACKENDS
from .choose import decisions
from .dispatch import lowrank_conv2d, lowrank_linear, lowrank_linears

__all__ = ["BACKENDS", "decisions", "lowrank_conv2d", "lowrank_linear", "lowrank_linears"]
