"""The activations of the kernels, value by value: products hide what half types round away."""

import pytest
import torch
import triton
import triton.language as tl
from support.kernel_cases import DEVICE

from alds_fast.kernels.fused.common import activate


@triton.jit
def _activate_kernel(x, y, count, ACTIVATION: tl.constexpr, EXACT: tl.constexpr, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    z = tl.load(x + i, mask=i < count, other=0.0)
    tl.store(y + i, activate(z, ACTIVATION, EXACT), mask=i < count)


@pytest.mark.parametrize(
    ("name", "exact", "function"),
    [
        ("gelu", False, torch.nn.functional.gelu),
        ("gelu", True, torch.nn.functional.gelu),
        ("silu", False, torch.nn.functional.silu),
        ("relu", False, torch.nn.functional.relu),
    ],
)
def test_values_are_within_a_millionth(name, exact, function):
    """Of silu also within four roundings of what it is: sums of exponentials divide."""
    x = torch.cat([torch.linspace(-12, 12, 20001, device=DEVICE), torch.tensor([-1e4, 0.0, 1e4], device=DEVICE)])
    y = torch.full_like(x, float("nan"))
    _activate_kernel[(triton.cdiv(x.numel(), 1024),)](x, y, x.numel(), name, exact, 1024)
    want = function(x.double())
    allowed = 4 * torch.finfo(torch.float32).eps * want.abs() if name == "silu" else torch.zeros_like(want)
    assert bool(((y.double() - want).abs() <= allowed.clamp_min(1e-6)).all())
