"""Latency as a cost: what candidates take, and a compressed model beside the dense one."""

from .layer_times import MAX_LATENCY_GROUPS, LayerTimes
from .random_models import end_to_end, random_model

__all__ = ["MAX_LATENCY_GROUPS", "LayerTimes", "end_to_end", "random_model"]
