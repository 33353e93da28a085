"""The same layer in other groups and ranks."""

import pytest
import torch

import alds_fast as alds
from alds_fast.deployment.equivalent_shapes import regroup, variants
from alds_fast.errors import ArgumentError


@pytest.mark.parametrize("scheme", [0, 1, 2, 3])
@pytest.mark.parametrize("conv_groups", [1, 2])
def test_regrouped_is_the_same_function(scheme, conv_groups):
    torch.manual_seed(0)
    layer = alds.LowRankConv2d(24, 16, 3, 1, scheme=scheme, groups=4, conv_groups=conv_groups, padding=1, dilation=2)
    layer, x = layer.double(), torch.randn(2, 24, 7, 7, dtype=torch.float64)
    for groups, rank in ((1, 4), (1, 6), (2, 2), (2, 5), (4, 1), (4, 3)):
        new = regroup(layer, groups, rank)
        assert (new.slices, new.rank) == (groups, rank)
        torch.testing.assert_close(new(x), layer(x))
        torch.testing.assert_close(new.dense_weight(), layer.dense_weight())


def test_regrouped_refuses():
    layer = alds.LowRankLinear(24, 16, 2, groups=4)
    for groups, rank, message in ((3, 8, "does not divide"), (2, 3, "outside 4..12"), (1, 17, "outside 8..16")):
        with pytest.raises(ArgumentError, match=message):
            regroup(layer, groups, rank)


def test_variants_are_smaller_than_dense():
    layer = alds.LowRankLinear(256, 256, 5, groups=4)
    layers = variants(layer, 8)
    assert layers and all(v.encoder.numel() + v.decoder.numel() < 256 * 256 for v in layers.values())
    assert all(v.rank % 8 == 0 and v.rank * v.slices >= 20 for v in layers.values())
