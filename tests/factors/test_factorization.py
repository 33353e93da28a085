import pytest
import torch
from support.models import small_net
from torch import nn

import alds_fast as alds
from alds_fast import linalg
from alds_fast.errors import LayerNotFoundError, PlanError, WeightError
from alds_fast.factors import Choice, factorize
from alds_fast.layers import replace_layers, weight_shape
from alds_fast.linalg import Decomposition, torch_backend


def _choice(model, name, rank=2):
    return Choice(name, weight_shape(dict(model.named_modules())[name]), Decomposition(0, 1, rank))


def test_report_says_how_the_factors_were_computed():
    model = nn.Sequential(nn.Linear(200, 200), nn.Linear(20, 20))
    _, reports = factorize(model, [_choice(model, "0"), _choice(model, "1", 9)])
    assert (reports["0"].method, reports["1"].method) == ("randomized", "exact")
    assert reports["0"].iterations >= 1 and reports["1"].iterations == 0


def test_report_shows_a_fallback(monkeypatch):
    model = nn.Sequential(nn.Linear(200, 200))
    values = linalg.spectra([model[0].weight.detach()[None]], [[1]])[0][0]

    def impossible(v, rank):
        return v.square().sum(-1) if rank == 0 else torch.zeros(v.shape[:-1], dtype=v.dtype)

    monkeypatch.setattr(linalg, "optimal_errors", impossible)
    _, reports = factorize(model, [_choice(model, "0")], {"0": values})
    assert reports["0"].method == "exact-fallback"


def test_report_error_is_the_true_one():
    model = nn.Sequential(nn.Linear(30, 20, dtype=torch.float64))
    small, reports = factorize(model, [_choice(model, "0", 5)])
    error = (small[0].dense_weight() - model[0].weight).norm() / model[0].weight.norm()
    assert reports["0"].error == pytest.approx(float(error.detach()), rel=1e-6)


def test_spectra_of_other_weights_are_not_trusted():
    model = nn.Sequential(nn.Linear(200, 200, dtype=torch.float64))
    stale = torch.full((1, 1, 200), 100.0, dtype=torch.float64)
    small, _ = factorize(model, [_choice(model, "0")], {"0": stale})
    error = float((small[0].dense_weight() - model[0].weight).norm().detach())
    best = float(torch.linalg.svdvals(model[0].weight.detach())[2:].norm())
    assert error <= best * (1 + torch_backend.TOLERANCE)


def test_choices_that_do_not_fit_the_model_are_refused():
    model = small_net()
    good = _choice(model, "5")
    with pytest.raises(LayerNotFoundError, match="layer 'nowhere' is not in the model"):
        factorize(model, [good._replace(name="nowhere")])
    with pytest.raises(PlanError, match="layer '8': the plan was made for"):
        factorize(model, [good._replace(name="8")])
    model[5].weight.data.fill_(float("nan"))
    with pytest.raises(WeightError, match="layer '5'"):
        factorize(model, [good])


def test_layers_that_must_not_be_replaced_are_refused():
    model = nn.ModuleDict({"attention": nn.MultiheadAttention(8, 2)})
    with pytest.raises(PlanError, match=r"'attention\.out_proj' cannot be replaced: .*reads this weight directly"):
        factorize(model, [_choice(model, "attention.out_proj")])


def test_replace_layers_takes_the_new_layer_and_copies_the_rest():
    model = small_net()
    layer = alds.LowRankConv2d(32, 32, 1, 2)
    copied = replace_layers(model, {"5": layer})
    assert copied[5] is layer and copied[0].weight is not model[0].weight
    assert torch.equal(copied[5].bias, model[5].bias) and copied[5].bias is not model[5].bias
