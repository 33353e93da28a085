"""Channel slices that cannot win are left out, and the plan is the same as with all of them."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.marks import slow
from torch import nn

import alds_fast as alds
from alds_fast.allocation import auto_groups, prune_spectra
from alds_fast.allocation.slice_pruning import may_win
from alds_fast.criteria import CRITERIA, layer_spectra
from alds_fast.layers import count_params, find_layers

BOUNDS = ("frobenius", "operator", "paper")


def falling(rows, cols, power, seed):
    generator = torch.Generator().manual_seed(seed)
    rank = min(rows, cols)
    left, right = torch.randn(rows, rank, generator=generator), torch.randn(rank, cols, generator=generator)
    return (left * torch.arange(1, rank + 1) ** -power) @ right


def model(power):
    layers = [nn.Linear(c, f, bias=False) for f, c in ((48, 64), (64, 48), (64, 160), (16, 96))]
    layers.append(nn.Conv2d(32, 24, 3, bias=False))
    for i, layer in enumerate(layers):
        layer.weight.data = falling(layer.weight.shape[0], layer.weight[0].numel(), power, i).view_as(layer.weight)
    return nn.Sequential(*layers)


@pytest.mark.parametrize("power", [slow(0.0), 0.5, slow(1.0)])
@pytest.mark.parametrize("pivots", [False, True])
@pytest.mark.parametrize("criterion", [*BOUNDS, "reference"])
def test_plans_are_those_of_all_slices(power, criterion, pivots):
    net = model(power)
    layers = find_layers(net)
    groups = tuple(range(1, 17))
    whole = {s.layer.name: s for s in layer_spectra(layers, (0, 1, 2, 3), groups)}
    least = {layer.name: 0.0 for layer in layers} if pivots else None
    for align in (1, 4):
        few = {s.layer.name: s for s in prune_spectra(layers, (0, 1, 2, 3), None, criterion, align, least)}
        assert all(set(few[n].values) <= set(whole[n].values) for n in whole)
        for n in whole:
            # (Gram matrices of coarse slices are sums of those of finer ones, so rounding depends on what is computed.)
            for k, v in few[n].values.items():
                torch.testing.assert_close(v, whole[n].values[k], rtol=1e-12, atol=1e-7 * whole[n].top[k[0]])
        analyses = [alds.Analysis(tuple(layers), by_name, count_params(net), net) for by_name in (whole, few)]
        for budget in ({"params": 0.7}, {"params": 0.3}, {"error": 0.2}):
            for p in (None,) if "error" in budget else (2.0, 4.0, np.inf):
                a, b = (x.plan(**budget, criterion=criterion, p=p, align=align, pivots=pivots) for x in analyses)
                assert [row.choice for row in a.layers] == [row.choice for row in b.layers]
                assert [row.error for row in a.layers] == pytest.approx([row.error for row in b.layers], rel=1e-9)
                assert a.gap == pytest.approx(b.gap, abs=1e-9)


def test_something_is_left_out_and_nothing_by_reference():
    layers = find_layers(model(1.0))
    sizes = {
        criterion: sum(len(s.values) for s in prune_spectra(layers, (0,), None, criterion))
        for criterion in ("frobenius", "reference")
    }
    assert sizes["frobenius"] < sizes["reference"]
    assert sizes["reference"] == sum(len(auto_groups(layer.shape.slice_channels)) for layer in layers)


def test_named_groups_only():
    spectra = prune_spectra(find_layers(nn.Sequential(nn.Linear(24, 24))), (0,), (8, 12), "frobenius")
    assert {k for _, k in spectra[0].values} <= {8, 12} and (0, 8) in spectra[0].values


@given(st.integers(1, 12), st.integers(1, 4), st.integers(2, 4), st.integers(1, 5), st.floats(0, 2), st.integers(0, 99))
def test_finer_slices_have_no_smaller_error(rows, coarse, finer, width, power, seed):
    fine = coarse * finer
    layer = nn.Linear(fine * width, rows, bias=False)
    layer.weight.data = falling(rows, fine * width, power, seed)
    (spectra,) = layer_spectra(find_layers(layer), (0,), (coarse, fine))
    for criterion in BOUNDS:
        errors = {k: spectra.errors(0, k, CRITERIA[criterion].rule).numpy() for k in (coarse, fine)}
        ranks = np.arange(len(errors[fine]))
        bound = errors[coarse][np.minimum(ranks * finer, len(errors[coarse]) - 1)]
        assert (errors[fine] >= bound - 1e-7).all()  # singular values are resolved to 1e-8 of the largest


def test_may_win_needs_something_to_compare_with():
    layer = find_layers(nn.Linear(8, 8))[0]
    (spectra,) = layer_spectra([layer], (0,), (3,))
    assert may_win(layer.shape, spectra, 0, 4, "frobenius", 1)
