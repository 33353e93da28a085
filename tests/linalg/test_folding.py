import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.models import weight_shapes

from alds_fast.errors import ArgumentError
from alds_fast.linalg import WeightShape, folding


def _weight(shape):
    return torch.arange(shape.numel, dtype=torch.float64).reshape(shape.weight)


@given(weight_shapes(), st.sampled_from(folding.SCHEMES))
def test_unfold_inverts_fold(shape, scheme):
    weight = _weight(shape)
    matrix = folding.fold(weight, shape, scheme)
    assert matrix.shape == folding.matrix_shape(shape, scheme)
    assert torch.equal(folding.unfold(matrix, shape, scheme), weight)


@given(weight_shapes(), st.sampled_from(folding.SCHEMES), st.data())
def test_column_slices_are_folded_channel_slices(shape, scheme, data):
    """Channels are sliced first, then folded (the reference implementation's table does it the other way round)."""
    groups = data.draw(st.sampled_from(folding.divisors(shape.slice_channels)))
    weight = _weight(shape)
    blocks = folding.fold(weight, shape, scheme).chunk(groups, 2)
    part = WeightShape(shape.out_channels, shape.in_channels // groups, shape.kernel, shape.conv_groups)
    for block, channels in zip(blocks, weight.chunk(groups, 1), strict=True):
        assert torch.equal(block, folding.fold(channels, part, scheme))


def test_fold_is_the_matrix_of_the_paper():
    shape = WeightShape(2, 3, (4, 5))
    weight = torch.randn(shape.weight)
    expected = {
        0: weight.reshape(2, 60),
        1: weight.permute(0, 2, 1, 3).reshape(8, 15),
        2: weight.permute(0, 3, 1, 2).reshape(10, 12),
        3: weight.permute(0, 2, 3, 1).reshape(40, 3),
    }
    for scheme, matrix in expected.items():
        assert torch.equal(folding.fold(weight, shape, scheme)[0], matrix)


@given(weight_shapes(), st.sampled_from(folding.SCHEMES), st.data())
def test_factors_to_weights_and_back(shape, scheme, data):
    groups = data.draw(st.sampled_from(folding.divisors(shape.slice_channels)))
    rank = data.draw(st.integers(1, folding.max_rank(shape, scheme, groups)))
    g0, rows, cols = folding.matrix_shape(shape, scheme)
    left = torch.randn(g0, groups, rows, rank, dtype=torch.float64)
    right = torch.randn(g0, groups, rank, cols // groups, dtype=torch.float64)
    encoder, decoder = folding.factors_to_weights(left, right, shape, scheme)
    assert (encoder.shape, decoder.shape) == folding.factor_shapes(shape, scheme, groups, rank)
    assert encoder.numel() + decoder.numel() == rank * folding.params_per_rank(shape, scheme, groups)
    product = (left @ right).transpose(1, 2).reshape(g0, rows, cols)
    dense = folding.weights_to_dense(encoder, decoder, shape, scheme, groups)
    torch.testing.assert_close(dense, folding.unfold(product, shape, scheme))


def test_params_per_rank_is_the_table_of_the_paper():
    f, c, k1, k2, groups = 7, 12, 3, 5, 4
    shape = WeightShape(f, c, (k1, k2))
    table = {
        0: groups * f + c * k1 * k2,
        1: groups * f * k1 + c * k2,
        2: groups * f * k2 + c * k1,
        3: groups * f * k1 * k2 + c,
    }
    assert {s: folding.params_per_rank(shape, s, groups) for s in folding.SCHEMES} == table


def test_schemes_that_coincide_are_tried_once():
    assert folding.distinct_schemes((0, 1, 2, 3), (1, 1)) == (0,)
    assert folding.distinct_schemes((0, 1, 2, 3), (1, 7)) == (0, 3)
    assert folding.distinct_schemes((0, 1, 2, 3), (3, 3, 3)) == (0, 1, 2, 3)
    assert folding.distinct_schemes((1,), (5,)) == (1,)


@given(st.integers(1, 3000))
def test_divisors(n):
    assert folding.divisors(n) == tuple(k for k in range(1, n + 1) if n % k == 0)


def test_unknown_scheme():
    with pytest.raises(ArgumentError, match=r"scheme 4 is not one of \(0, 1, 2, 3\)"):
        folding.decoder_axes(4, (3, 3))
