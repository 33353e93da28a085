"""Models and strategies that several test modules use."""

import torch
from hypothesis import strategies as st
from torch import nn

from alds_fast.layers import count_params
from alds_fast.linalg import WeightShape

CONV = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}


def small_net(seed=0):
    """A small convolutional classifier for 3 x 12 x 12 images, with the usual kinds of layers."""
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(3, 24, 3, padding=1), nn.BatchNorm2d(24), nn.ReLU(), nn.Conv2d(24, 32, 3, groups=2), nn.ReLU(),
        nn.Conv2d(32, 32, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10),
    ).eval()  # fmt: skip


def images(count=4, seed=1):
    return torch.randn(count, 3, 12, 12, generator=torch.Generator().manual_seed(seed))


def count(model):
    """Parameters, indices of pivots among them."""
    return count_params(model)


@st.composite
def weight_shapes(draw):
    """Shapes of Linear and Conv1d/2d/3d weights, grouped and depthwise ones included."""
    g0 = draw(st.sampled_from([1, 1, 2, 3]))
    channels, filters = g0 * draw(st.sampled_from([1, 2, 3, 4, 6])), g0 * draw(st.integers(1, 5))
    kernel = draw(st.lists(st.integers(1, 4), max_size=3))
    return WeightShape(filters, channels, tuple(kernel), g0 if kernel else 1)


class Wrapped(torch.Tensor):
    """A tensor that holds another one and no memory, as quantised and sharded ones do."""

    @staticmethod
    def __new__(cls, inner):
        return torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype, device=inner.device)

    def __init__(self, inner):
        self.inner = inner

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        unwrapped = torch.utils._pytree.tree_map_only(Wrapped, lambda t: t.inner, (args, kwargs or {}))
        result = func(*unwrapped[0], **unwrapped[1])
        copies = (torch.ops.aten.detach.default, torch.ops.aten.clone.default)
        return cls(result) if func in copies else result
