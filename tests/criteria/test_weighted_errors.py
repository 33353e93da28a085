"""Errors and factors weighted by data: against brute force, direct minimisation in float64, and the certificate."""

from dataclasses import replace

import pytest
import torch
from support.marks import slow
from support.population import without_noise
from torch import nn

from alds_fast.criteria import collect_moments, fold_matrix, slice_bases, tap_blocks, weighting
from alds_fast.criteria.one_slice import one_slice
from alds_fast.criteria.weighted_errors import certificate, errors, held_out_errors
from alds_fast.criteria.weights import weight_for_errors
from alds_fast.factors.weighted import factors
from alds_fast.layers import find_layers
from alds_fast.linalg import Decomposition, distinct_schemes, divisors, max_rank, unfold
from alds_fast.linalg.torch_backend import spectra_ref

LAYERS = {
    "linear": (lambda: nn.Linear(12, 9), (50, 3, 12)),
    "strided": (lambda: nn.Conv2d(6, 8, 3, padding=1, stride=2), (5, 6, 9, 9)),
    "grouped": (lambda: nn.Conv2d(6, 8, (3, 2), padding="same", groups=2, padding_mode="circular"), (5, 6, 9, 9)),
    "dilated": (lambda: nn.Conv1d(4, 10, 5, dilation=2, bias=False), (5, 4, 19)),
}


def case(name, count=2, gradient=True, dead=False, order=4096):
    """A layer in a small network, float64, and its moments on data."""
    torch.manual_seed(0)
    build, shape = LAYERS[name]
    model = nn.Sequential(build(), nn.GELU(), nn.Flatten(), nn.LazyLinear(3)).double()
    data = [torch.randn(shape).double() * (1 + i) + 0.3 for i in range(count)]
    if dead:
        for x in data:
            x[..., :2] = 0 if name == "linear" else x[..., :2]
            x[:, 1] = 0 if name != "linear" else x[:, 1]
    model(data[0])
    layer = find_layers(model)[0]
    return layer, collect_moments(model, data, [layer], sensitivity=gradient, order=order)["0"]


def every_fold(layer):
    for scheme in distinct_schemes((0, 1, 2, 3), layer.shape.kernel):
        for groups in divisors(layer.shape.slice_channels):
            yield scheme, groups


def true_error(w, scheme, groups, rank):
    """tr(H E C E^T H) of slices each cut to its own top eigenvectors, with E written out."""
    bases = slice_bases(w, scheme, groups, tap_blocks(w, scheme))
    left = bases.left[..., :rank]
    cut = (left @ (left.mT @ bases.slices)).transpose(1, 2).flatten(2)
    whole = w.weight if w.root is None else w.root @ w.weight
    lost = whole - unfold(cut, w.shape, scheme).reshape(w.weight.shape)
    return float((lost @ w.second * lost).sum().clamp_min(0) / w.scale) ** 0.5


@pytest.mark.parametrize("name", list(LAYERS))
@pytest.mark.parametrize(("centred", "sensitive"), [(False, False), (True, False), (True, True)])
def test_errors_are_those_of_the_truncated_weight(name, centred, sensitive):
    layer, moments = case(name)
    w = weighting(layer.shape, layer.module.weight, moments, centred, sensitive)
    for scheme, groups in every_fold(layer):
        stated = errors(w, scheme, groups)
        assert len(stated) == max_rank(layer.shape, scheme, groups) + 1 and stated[-1] == 0
        for rank in range(len(stated) - 1):
            assert abs(float(stated[rank]) - true_error(w, scheme, groups, rank)) < 1e-7 * float(1 + stated[0])


def unread(layer):
    """The layer without two of its inputs: the product of its weight is singular."""
    with torch.no_grad():
        layer.weight[:, 2:4] = 0
    return layer


TALL = {
    "unread": (lambda: unread(nn.Linear(7, 40)), (50, 3, 7), False),
    "head": (lambda: nn.Linear(7, 40, bias=False), (50, 3, 7), False),
    "diagonal": (lambda: nn.Linear(7, 40), (50, 3, 7), True),
    "taps": (lambda: nn.Conv2d(2, 60, 3), (5, 2, 9, 9), False),
    "groups": (lambda: nn.Conv1d(4, 60, 5, groups=2), (5, 4, 19), False),
}


@pytest.mark.parametrize("name", list(TALL))
@pytest.mark.parametrize("sensitive", [False, True])
def test_more_filters_than_columns_are_taken_together(name, sensitive, monkeypatch):
    monkeypatch.setattr("alds_fast.criteria.weights.BLOCK", 16)  # taken up in several parts
    build, shape, diagonal = TALL[name]
    torch.manual_seed(0)
    model = nn.Sequential(build(), nn.GELU(), nn.Flatten(), nn.LazyLinear(3)).double()
    data = [torch.randn(shape).double() + 0.3 for _ in range(2)]
    model(data[0])
    layer = find_layers(model)[0]
    weight = layer.module.weight
    moments = collect_moments(model, data, [layer], sensitivity=True, held_out=0.2)["0"]
    if diagonal:
        moments = replace(moments, gradient=moments.gradient.diagonal(dim1=-2, dim2=-1))
    whole = weighting(layer.shape, weight, moments, True, sensitive)
    r = weight_for_errors(layer.shape, weight, moments, sensitive)
    assert r.shape == (layer.shape.conv_groups, layer.shape.columns, layer.shape.columns)
    few = weighting(layer.shape, weight, moments, True, sensitive, few=r)
    assert few.root is None and few.scale == pytest.approx(whole.scale)
    for scheme, groups in every_fold(layer):
        for rule in (errors, held_out_errors, certificate):
            torch.testing.assert_close(rule(few, scheme, groups), rule(whole, scheme, groups), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("name", [*LAYERS, *TALL])
@pytest.mark.parametrize("centred", [False, True])
@pytest.mark.parametrize("sensitive", [False, True])
@pytest.mark.parametrize("outputs", [False, True])
def test_errors_of_one_slice_for_any_share(name, centred, sensitive, outputs):
    """Against the general way, with moments of inputs or, of outputs alone, as those of wide layers."""
    build, shape, *_ = (LAYERS | TALL)[name]
    torch.manual_seed(0)
    model = nn.Sequential(build(), nn.GELU(), nn.Flatten(), nn.LazyLinear(3)).double()
    data = [torch.randn(shape).double() + 0.3 for _ in range(2)]
    model(data[0])
    layer = find_layers(model)[0]
    weight, order = layer.module.weight, 1 if outputs else 4096
    moments = collect_moments(model, data, [layer], sensitivity=True, held_out=0.2, order=order)["0"]
    assert (moments.second is None) is outputs
    one = one_slice(
        layer.shape, weight, moments, centred, sensitive, weight_for_errors(layer.shape, weight, moments, sensitive)
    )
    without = replace(one, seen=None)
    for share in (0.0, 0.3, 1.0):
        w = weighting(layer.shape, weight, moments, centred, sensitive, share)
        stated, held_out = one.errors(share)
        for found, rule in ((stated, errors), (held_out, held_out_errors), (without.errors(share)[0], errors)):
            wanted = rule(w, 0, 1)[: len(found)]
            torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-7 * float(1 + wanted[0]))
        assert without.errors(share)[1] is None


def test_the_weight_itself_is_what_errors_depend_on_without_gradients():
    layer, moments = case("linear")
    assert weight_for_errors(layer.shape, layer.module.weight, moments, False) is None


@pytest.mark.parametrize("name", list(LAYERS))
def test_certificate_holds_and_is_tight_for_one_slice(name):
    layer, moments = case(name)
    w = weighting(layer.shape, layer.module.weight, moments, False, False)
    for scheme, groups in every_fold(layer):
        exact, bound = errors(w, scheme, groups), certificate(w, scheme, groups)
        assert bool((bound >= exact * (1 - 1e-9)).all())
        if scheme == 0 and groups == 1:
            torch.testing.assert_close(bound, exact, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("name", list(LAYERS))
@pytest.mark.parametrize("order", [slow(4096), 1])
def test_factors_reach_the_error_and_full_rank_is_exact(name, order):
    layer, moments = case(name, order=order)
    weight = layer.module.weight.detach()
    dense = weight.reshape(layer.shape.conv_groups, -1, weight[0].numel())
    for sensitive in (False, True):
        w = weighting(layer.shape, layer.module.weight, moments, layer.own_bias, sensitive)
        for scheme, groups in every_fold(layer) if order > 1 else [(0, 1)]:
            stated = errors(w, scheme, groups)
            for rank in range(1, len(stated)):
                factor_pair = factors(w, Decomposition(scheme, groups, rank))
                assert factor_pair.error <= float(stated[rank]) + 1e-6
            product = (factor_pair.left @ factor_pair.right).transpose(1, 2).flatten(2)
            whole = unfold(product, layer.shape, scheme).reshape(dense.shape)
            torch.testing.assert_close(whole, dense, rtol=1e-5, atol=1e-5)
            assert float(factor_pair.shift.abs().max()) < 1e-5


def minimised(w, rank, steps=400):
    """Least ||(W - A B) C^(1/2)||^2 found by alternating least squares from a random start, in float64."""
    values, vectors = torch.linalg.eigh(w.second[0])
    root = vectors * values.clamp_min(0).sqrt() @ vectors.mT
    target, b = w.weight[0] @ root, torch.randn(rank, w.second.shape[-1], dtype=torch.float64)
    for _ in range(steps):
        seen = b @ root
        a = torch.linalg.lstsq(seen.mT, target.mT, driver="gelsd").solution.mT
        b = torch.linalg.lstsq(a, w.weight[0], driver="gelsd").solution
    return float((target - a @ b @ root).square().sum() / w.scale) ** 0.5


@pytest.mark.parametrize("centred", [False, True])
@pytest.mark.parametrize("rank", [1, 3, 6])
def test_output_mode_is_the_direct_minimum(rank, centred):
    layer, moments = case("linear")
    w = weighting(layer.shape, layer.module.weight, moments, centred, False)
    stated, factor_pair = float(errors(w, 0, 1)[rank]), factors(w, Decomposition(0, 1, rank))
    assert factor_pair.error == pytest.approx(stated, rel=1e-9)
    assert minimised(w, rank) == pytest.approx(stated, rel=1e-4)


def test_one_slice_is_pca_of_the_output():
    """Eigenvalues of the covariance of y, computed from the outputs themselves."""
    layer, moments = case("linear", count=1)
    moments = without_noise(moments)
    torch.manual_seed(0)
    model = nn.Sequential(LAYERS["linear"][0](), nn.GELU(), nn.Flatten(), nn.LazyLinear(3)).double()
    x = torch.randn(LAYERS["linear"][1]).double() + 0.3
    y = x.flatten(0, 1) @ model[0].weight.mT
    values = torch.linalg.eigvalsh(torch.cov(y.mT, correction=0)).flip(0)
    w = weighting(layer.shape, layer.module.weight, moments, True, False)
    tails = torch.stack([values[j:].sum() for j in range(10)]) / float(y.square().sum(1).mean())
    torch.testing.assert_close(errors(w, 0, 1).square(), tails, rtol=1e-7, atol=1e-12)


def test_white_data_gives_the_frobenius_error():
    layer, moments = case("linear")
    white = moments.__class__(1, torch.eye(12).double()[None], torch.zeros(1, 12).double())
    w = weighting(layer.shape, layer.module.weight, white, False, False)
    values = spectra_ref(fold_matrix(w, w.weight, 0), [1])[0].flatten()
    tails = torch.stack([values[j:].square().sum() for j in range(10)]) / values.square().sum()
    torch.testing.assert_close(errors(w, 0, 1), tails.sqrt(), rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("name", list(LAYERS))
def test_few_samples_and_dead_channels(name):
    """A singular moment: the error on the data is nothing once the rank covers it, and nothing breaks down."""
    layer, moments = case(name, count=1, dead=True)
    few = moments.__class__(1, moments.mean.unsqueeze(-1) * moments.mean.unsqueeze(-2), moments.mean)
    for seen in (moments, few):
        w = weighting(layer.shape, layer.module.weight, seen, False, False)
        for scheme, groups in every_fold(layer):
            stated = errors(w, scheme, groups)
            assert bool(stated.isfinite().all())
            rank = min(2, len(stated) - 1)
            factor_pair = factors(w, Decomposition(scheme, groups, rank))
            assert factor_pair.error <= float(stated[rank]) + 1e-6 and bool(factor_pair.left.isfinite().all())
    assert float(errors(w, 0, 1)[1]) < 1e-6


def test_sensitive_errors_predict_the_change_of_a_linear_network():
    """For y = V W x the error tr(G E C E^T), G = V^T V / E||y||^2, is exactly that of the network's output."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 6, bias=False), nn.Linear(6, 5, bias=False)).double()
    x, layer = torch.randn(40, 8).double(), find_layers(model)[0]
    moments = without_noise(collect_moments(model, [x] * 200, [layer], sensitivity=True)["0"])
    w = weighting(layer.shape, layer.module.weight, moments, False, True)
    factor_pair = factors(w, Decomposition(0, 1, 3))
    small = (factor_pair.left @ factor_pair.right)[0, 0]
    y, cut = x @ model[0].weight.T @ model[1].weight.T, x @ small.T @ model[1].weight.T
    assert factor_pair.error == pytest.approx(float((y - cut).norm() / y.norm()), rel=0.1)
