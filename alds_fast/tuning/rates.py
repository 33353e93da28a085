"""What a device does at best, which the model of a launch's time is scaled to."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

_PRODUCTS = {(8, 0): 1024, (9, 0): 2048}  # a clock and multiprocessor, half types; 512 of smaller devices
L2_BYTES_A_CLOCK = 25  # of a multiprocessor: 5.5 TB/s of an H100 and 4.0 of an A100 are 24 and 26
REACHED = 0.88  # of a memory's nominal bandwidth


class Rates(NamedTuple):
    """Multiprocessors, clock in Hz, products a clock and multiprocessor in half types, bytes a second, bytes."""

    capability: tuple[int, int]
    multiprocessors: int
    clock: float
    products: int
    l2: float
    memory: float
    shared_limit: int
    launch: float = 1.5e-6  # seconds, in a CUDA graph

    @classmethod
    def of(cls, properties: Any) -> Rates:
        """Of what torch.cuda.get_device_properties returns; clocks there are in kHz."""
        clock, count = (properties.clock_rate or 1_500_000) * 1e3, properties.multi_processor_count  # 0 if hidden
        memory = 2e3 * (properties.memory_clock_rate or 1_500_000) * properties.memory_bus_width / 8 * REACHED
        capability = properties.major, properties.minor
        products = _PRODUCTS.get(capability, 512)
        shared = properties.shared_memory_per_multiprocessor - 1024  # which the system keeps
        return cls(capability, count, clock, products, L2_BYTES_A_CLOCK * count * clock, memory, shared)


H100 = Rates((9, 0), 132, 1.70e9, 2048, 5.5e12, 2.95e12, 227 * 1024)
A100 = Rates((8, 0), 108, 1.41e9, 1024, 4.0e12, 1.75e12, 163 * 1024, 2.0e-6)


def item_size(dtype: torch.dtype) -> int:
    """Bytes of a value."""
    return torch.empty(0, dtype=dtype, device="meta").element_size()
