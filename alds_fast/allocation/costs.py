"""What layers cost: parameters and floating-point operations."""

from __future__ import annotations

SHARES = {
    "params": "parameters kept",
    "flops": "floating-point operations kept",
    "latency": "the dense model's latency that is left",
}
