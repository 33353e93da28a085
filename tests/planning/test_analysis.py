"""Budgets, options and bad input, tried as a user would."""

import math

import numpy as np
import pytest
import torch
from support.models import count, images, small_net
from torch import nn

import alds_fast as alds
from alds_fast.criteria import WEIGHT_CRITERIA
from alds_fast.errors import AldsError, ArgumentError, BudgetError, LayerNotFoundError, ModelError, WeightError
from alds_fast.layers import weight_shape
from alds_fast.linalg.folding import fold


@pytest.fixture(scope="module")
def analysis():
    return alds.analyze(small_net())


# ------------------------------------------------------------------------------------------------- budgets


@pytest.mark.parametrize("keep", [0.2, 0.35, 0.5, 0.8, 0.99, 1.0, np.float32(0.5), 1])
@pytest.mark.parametrize("p", [1, 2, 8, math.inf])
def test_a_budget_is_never_exceeded(analysis, keep, p):
    model = small_net()
    plan = analysis.plan(params=keep, p=p)
    small = plan.apply(model)
    assert plan.params == count(small) <= keep * count(model)
    assert plan.gap >= 0 and (p < math.inf or plan.gap == 0)
    assert small(images()).shape == model(images()).shape


def test_a_budget_of_one_keeps_the_model_dense(analysis):
    model = small_net()
    plan = analysis.plan(params=1.0)
    assert plan.error == 0.0 and all(row.rank is None for row in plan.layers)
    assert {row.reason for row in plan.layers} == {"the budget lets it stay dense"}
    assert torch.equal(plan.apply(model)(images()), model(images()))


@pytest.mark.parametrize("error", [0.0, 0.1, 0.5, 0.9, 5.0])
@pytest.mark.parametrize("criterion", WEIGHT_CRITERIA)
def test_an_error_budget_holds_for_every_layer(analysis, error, criterion):
    plan = analysis.plan(error=error, criterion=criterion)
    assert plan.error <= error and plan.criterion == criterion
    if error == 0.0:
        assert plan.params == analysis.params


def test_error_budgets_trade_against_parameters(analysis):
    sizes = [analysis.plan(error=e).params for e in (0.0, 0.4, 0.5, 0.6, 0.8)]
    assert sizes == sorted(sizes, reverse=True) and len(set(sizes)) == 5


@pytest.mark.parametrize(
    ("budget", "message"),
    [
        ({}, "one budget or several of params=, flops=, memory= and latency=, or error= alone, or quality= with"),
        ({"params": 0.5, "error": 0.5}, "or quality= with evaluate=, got error= with params"),
        ({"params": 0}, r"params=0 is outside \(0, 1\]"),
        ({"params": 1.5}, r"params=1\.5 is outside \(0, 1\].*an integer above 1 is a number of them"),
        ({"params": 5e6}, r"params=5000000\.0 is outside"),
        ({"memory": "20 apples"}, "memory='20 apples' is not like '20MB', with a unit out of kB, kiB, MB"),
        ({"memory": 2.5}, r"memory=2\.5 is outside \(0, 1\].*a text like '20MB' too"),
        ({"memory": "0 MB"}, "memory=0 is outside"),
        ({"params": -1}, r"params=-1 is outside \(0, 1\]"),
        ({"params": math.nan}, r"params=nan is outside"),
        ({"params": "50%"}, r"params='50%' is outside \(0, 1\].*for example params=0\.5"),
        ({"params": True}, r"params=True is outside"),
        ({"params": torch.tensor(0.5)}, r"params=tensor\(0\.5000\) is outside"),
        ({"error": -0.1}, r"error=-0\.1 is outside \[0, inf\)"),
        ({"error": math.inf}, r"error=inf is outside"),
        ({"error": math.nan}, r"error=nan is outside"),
        ({"error": "low"}, r"error='low' is outside"),
    ],
)
def test_bad_budgets_are_refused(analysis, budget, message):
    for call in (analysis.plan, lambda **b: alds.compress(small_net(), **b)):
        with pytest.raises(BudgetError, match=message) as caught:
            call(**budget)
        assert isinstance(caught.value, AldsError) and isinstance(caught.value, ValueError)


def test_a_budget_that_cannot_be_met_names_the_smallest_reachable_one(analysis):
    with pytest.raises(
        BudgetError, match=r"params=0\.001 cannot be met: the smallest reachable is params=(0\.\d+)"
    ) as e:
        analysis.plan(params=0.001)
    reachable = float(str(e.value).split("reachable is params=")[1].split(",")[0])
    assert analysis.plan(params=reachable).params <= reachable * analysis.params
    with pytest.raises(BudgetError):
        analysis.plan(params=reachable - 0.002)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"criterion": "nuclear"}, "criterion='nuclear' is not one of frobenius, operator, paper, reference"),
        ({"p": 0.5}, r"p=0\.5 is outside \[1, inf\]"),
        ({"p": math.nan}, "p=nan is outside"),
        ({"p": "inf"}, "p='inf' is outside"),
        ({"p": 10**400}, "p=1000+ is outside"),
        ({"criterion": ["frobenius"]}, "criterion=.'frobenius'. is not one of"),
        ({"method": "magic"}, "method='magic' is not one of alds, alds-heuristic"),
        ({"align": 0}, "align=0 is not an integer >= 1"),
        ({"align": 8.0}, r"align=8\.0 is not an integer"),
        (
            {"method": "alds-heuristic", "p": 2},
            "p=2 applies to budgets other than error= with method='alds' only",
        ),
    ],
)
def test_bad_options_are_refused(analysis, options, message):
    for call in (analysis.plan, lambda **o: alds.compress(small_net(), **o)):
        with pytest.raises(ArgumentError, match=message):
            call(params=0.5, **options)


def test_options_that_need_a_parameter_budget(analysis):
    with pytest.raises(ArgumentError, match="p=2 applies to budgets"):
        analysis.plan(error=0.3, p=2)
    with pytest.raises(ArgumentError, match="method='alds-heuristic' needs params="):
        analysis.plan(error=0.3, method="alds-heuristic")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"schemes": ()}, r"schemes=\(\): expected a non-empty sequence"),
        ({"schemes": (4,)}, r"schemes=\(4,\)"),
        ({"schemes": 0}, "schemes=0"),
        ({"groups": "all"}, "groups='all': expected 'divisors' or"),
        ({"groups": ()}, r"groups=\(\)"),
        ({"groups": (0,)}, r"groups=\(0,\)"),
        ({"groups": (1.0,)}, r"groups=\(1\.0,\)"),
        ({"groups": 4}, "groups=4"),
        ({"schemes": None}, "schemes=None"),
        ({"include": 3}, "include=3: expected a name pattern or several"),
        ({"exclude": [3]}, r"exclude=\[3\]: expected a name pattern"),
    ],
)
def test_bad_analysis_options_are_refused(options, message):
    with pytest.raises(ArgumentError, match=message):
        alds.analyze(small_net(), **options)


def test_compress_refuses_an_unknown_option():
    with pytest.raises(
        ArgumentError, match="unknown option 'rank'; did you mean 'min_rank'[?]; options are align, bias"
    ):
        alds.compress(small_net(), params=0.5, rank=3)


@pytest.mark.parametrize(
    ("option", "hint"),
    [
        ({"param": 0.5}, "; did you mean 'params'[?]"),
        ({"exclude": "0"}, ": analyze.. takes it; pins=.pattern: 'dense'. keeps layers dense"),
        ({"zzz": 1}, "; options are params, flops, memory"),
    ],
)
def test_plan_refuses_an_unknown_option(analysis, option, hint):
    with pytest.raises(ArgumentError, match=f"plan has no option '{next(iter(option))}'{hint}"):
        analysis.plan(**option)


def test_a_row_of_a_plan_by_name(analysis):
    plan = analysis.plan(params=0.5)
    assert [plan[row.name] for row in plan] == list(plan.layers)
    near = plan.layers[0].name
    with pytest.raises(LayerNotFoundError, match=f"no layer has that name; did you mean '{near}'"):
        plan[near + "x"]
    with pytest.raises(LayerNotFoundError, match="plan.0.: no layer has that name"):
        plan[0]


# ------------------------------------------------------------------------------------------------- content


@pytest.mark.parametrize("criterion", WEIGHT_CRITERIA)
def test_plan_errors_are_those_of_the_compressed_weights(analysis, criterion):
    """The frobenius error of each row is the true one; the operator bounds hold for the true operator error."""
    model = small_net().double()
    plan = alds.analyze(model).plan(params=0.4, criterion=criterion, p=math.inf, bias_correction=False)
    small = plan.apply(model)
    modules, replaced = dict(model.named_modules()), dict(small.named_modules())
    for row in plan.layers:
        shape = weight_shape(modules[row.name])
        dense, small_weight = modules[row.name].weight, replaced[row.name].dense_weight()
        scheme = row.scheme
        w, e = fold(dense, shape, scheme), fold(dense - small_weight, shape, scheme)
        frobenius = float(e.norm() / w.norm())
        operator = float(torch.linalg.matrix_norm(e, 2).max() / torch.linalg.matrix_norm(w, 2).max())
        if criterion == "frobenius":
            assert row.error == pytest.approx(frobenius, rel=1e-3)
        elif criterion != "reference":
            assert row.error >= operator * (1 - 1e-3)
        assert row.params_after == count(replaced[row.name])


@pytest.mark.parametrize("criterion", ["operator", "paper"])
def test_bounds_hold_for_large_layers_of_low_rank(criterion):
    """Where a sketch would do for the Frobenius norm, the operator norm asks for the exact decomposition."""
    torch.manual_seed(0)
    u, v = (torch.linalg.qr(torch.randn(400, 400))[0] for _ in range(2))
    model = nn.Linear(400, 400, bias=False)
    model.weight = nn.Parameter((u * torch.cat([torch.tensor([1.3]), torch.ones(399)])) @ v)
    plan = alds.analyze(model, groups=(1,)).plan(params=0.01, criterion=criterion)
    error = (plan.apply(model).dense_weight() - model.weight).detach().double()
    true = torch.linalg.matrix_norm(error, 2) / torch.linalg.matrix_norm(model.weight.detach().double(), 2)
    assert float(true) <= plan.error * (1 + 1e-6)


def test_an_error_budget_holds_for_the_applied_model():
    model = nn.Linear(500, 500, bias=False)
    plan = alds.analyze(model, groups=(1,)).plan(error=0.95)
    small = plan.apply(model)
    true = (small.dense_weight() - model.weight).double().norm() / model.weight.double().norm()
    assert plan.layers[0].rank < 42 and float(true.detach()) <= 0.95


def test_a_sketch_keeps_within_its_certificate_of_the_stated_error():
    model = nn.Linear(500, 500, bias=False)
    plan = alds.analyze(model, groups=(1,)).plan(params=0.05)
    small = plan.apply(model)
    assert small.alds_factors[""].method == "randomized"
    assert plan.error <= small.alds_factors[""].error <= plan.error * (1 + 5e-4) + 1e-12


def test_align_is_part_of_the_optimisation(analysis):
    free, aligned = analysis.plan(params=0.5), analysis.plan(params=0.5, align=4)
    assert all(row.rank % 4 == 0 for row in aligned.layers if row.rank is not None)
    assert aligned.params <= 0.5 * analysis.params and aligned.error >= free.error and aligned.align == 4


def test_align_larger_than_any_rank_leaves_layers_dense():
    plan = alds.analyze(nn.Linear(8, 8)).plan(params=1.0, align=64)
    assert plan.layers[0].reason == "no factorisation with ranks that are multiples of 64 is smaller"


def test_schemes_and_groups_are_respected():
    analysis = alds.analyze(small_net(), schemes=(1, 2), groups=(2, 4))
    plan = analysis.plan(params=0.6)
    rows = {row.name: row for row in plan.layers}
    assert all(row.groups in (2, 4) for row in plan.layers if row.groups)
    assert all(row.scheme in (1, 2) for row in plan.layers if row.scheme is not None)
    assert rows["0"].reason == "none of groups=(2, 4) divides its 3 channels"


def test_more_choices_are_never_worse():
    model = small_net()
    few = alds.analyze(model, schemes=(0,), groups=(1,)).plan(params=0.4)
    many = alds.analyze(model).plan(params=0.4)
    assert many.error <= few.error


def test_analysis_prints_every_layer(analysis):
    text = str(analysis)
    assert "24x3x3x3" in text and "4 layers that can be factorised" in text


# ------------------------------------------------------------------------------------------- hard weights


def test_nan_and_infinite_weights_name_the_layer_and_the_remedy():
    for bad in (math.nan, math.inf, -math.inf):
        model = small_net()
        with torch.no_grad():
            model[5].weight[3, 2, 0, 0] = bad
        with pytest.raises(WeightError, match=r"layer '5': 1 of 1024 weights are NaN, infinite.*exclude=\['5'\]"):
            alds.analyze(model)
        assert alds.analyze(model, exclude=["5"]).plan(params=0.6).apply(model)[5].weight.shape == (32, 32, 1, 1)


def test_weights_too_large_to_square_are_refused():
    model = nn.Linear(4, 4).double()
    with torch.no_grad():
        model.weight[0, 0] = 1e200
    with pytest.raises(WeightError, match="1 of 16 weights are NaN, infinite or above 1e150"):
        alds.analyze(model)


def test_weights_too_small_to_square_are_refused():
    with pytest.raises(WeightError, match="its largest weight is .*e-170, below 1e-150"):
        model = nn.Linear(4, 4, bias=False).double()
        nn.init.constant_(model.weight, 1e-170)
        alds.analyze(model)


def test_meta_models_are_refused_with_the_remedy():
    with torch.device("meta"):
        model = nn.Linear(4, 4)
    with pytest.raises(WeightError, match="the model itself: its weight is on the meta device.*load the weights first"):
        alds.analyze(model)


def test_zero_weights_compress_to_zero():
    model = nn.Conv2d(8, 8, 3)
    nn.init.zeros_(model.weight)
    small = alds.compress(model, error=0.0)
    assert small.rank == 1 and torch.equal(small(torch.randn(1, 8, 5, 5)), model(torch.randn(1, 8, 5, 5)))


@pytest.mark.parametrize(
    "module",
    [
        nn.Linear(1, 1), nn.Linear(5, 1), nn.Linear(1, 5), nn.Conv2d(1, 1, 1), nn.Conv2d(1, 8, 3), nn.Conv2d(8, 1, 3),
        nn.Conv2d(6, 6, 3, groups=6), nn.Conv1d(4, 8, 1), nn.Conv3d(1, 2, 2), nn.Conv2d(16, 16, 1),
    ],
    ids=repr,
)  # fmt: skip
def test_tiny_layers(module):
    shape = {"Linear": (2,), "Conv1d": (2, 7)}.get(type(module).__name__, (2, 7, 7))
    shape = (2, 7, 7, 7) if isinstance(module, nn.Conv3d) else shape
    channels = module.in_features if isinstance(module, nn.Linear) else module.in_channels
    x = torch.randn(shape[0], channels, *shape[1:])
    for error in (0.0, 0.3, 1.0):
        small = alds.compress(module, error=error)
        assert count(small) <= count(module) and small(x).shape == module(x).shape
    torch.testing.assert_close(alds.compress(module, error=1e-6)(x), module(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_every_floating_type_keeps_its_type(dtype):
    model = nn.Sequential(nn.Conv2d(8, 16, 3), nn.Flatten(), nn.Linear(16, 16)).to(dtype)
    small = alds.compress(model, params=0.5)
    assert {p.dtype for p in small.parameters()} == {dtype}
    exact = alds.compress(model.double(), params=0.5)
    for a, b in zip(small.alds_plan.layers, exact.alds_plan.layers, strict=True):
        assert (a.scheme, a.groups, a.rank) == (b.scheme, b.groups, b.rank)
        assert a.error == pytest.approx(b.error, rel=1e-6)


def test_non_contiguous_weights():
    plain, strided = small_net(), small_net().to(memory_format=torch.channels_last)
    strided[8].weight = nn.Parameter(strided[8].weight.detach().T.contiguous().T)
    assert not strided[3].weight.is_contiguous() and not strided[8].weight.is_contiguous()
    a, b = (alds.analyze(m).plan(params=0.5) for m in (plain, strided))
    assert [(r.scheme, r.groups, r.rank) for r in a.layers] == [(r.scheme, r.groups, r.rank) for r in b.layers]
    torch.testing.assert_close(b.apply(strided)(images()), a.apply(plain)(images()))


def test_a_model_with_nothing_to_compress():
    for model in (nn.Sequential(nn.ReLU(), nn.BatchNorm1d(4)), nn.Embedding(5, 4), nn.Identity()):
        analysis = alds.analyze(model)
        assert analysis.plan(params=1.0).apply(model) is not model
    with pytest.raises(BudgetError, match=r"the smallest reachable is params=1, 20 of 20 parameters"):
        alds.compress(nn.Embedding(5, 4), params=0.5)
    assert alds.compress(nn.Embedding(5, 4), error=0.5).weight.shape == (5, 4)


def test_the_input_model_is_never_changed():
    model = small_net()
    before, text = {k: v.clone() for k, v in model.state_dict().items()}, repr(model)
    small = alds.compress(model, params=0.3)
    with torch.no_grad():
        for p in small.parameters():
            p.zero_()
    assert repr(model) == text and vars(model).keys() == vars(small_net()).keys()
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())


def test_frozen_and_training_state_carry_over():
    model = small_net().train()
    model[5].requires_grad_(False)
    small = alds.compress(model, params=0.4)
    assert small.training and small[3].training
    assert not small[5].encoder.requires_grad and not small[5].bias.requires_grad and small[3].encoder.requires_grad


class _NoCopy(nn.Linear):
    def __deepcopy__(self, memo):
        raise RuntimeError("no copies of me")


def test_a_model_that_cannot_be_copied_is_refused():
    model = nn.Sequential(nn.Linear(8, 8), _NoCopy(8, 8))
    with pytest.raises(ModelError, match="cannot be deep-copied .no copies of me"):
        alds.compress(model, error=0.5)


@pytest.mark.filterwarnings("ignore:.*nested tensor")
def test_torch_transformer_layers_still_run_in_evaluation():
    """Their fused inference path reads linear1.weight; it is switched off where that is gone."""
    layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True)
    model = nn.TransformerEncoder(layer, 2).eval()
    small, x = alds.compress(model, error=1e-6, include="layers.*.linear*"), torch.randn(2, 5, 32)
    mask = torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
    assert isinstance(alds.compress(model, params=0.7).layers[0].linear1, alds.LowRankLinear)
    with torch.inference_mode():
        torch.testing.assert_close(small(x), model(x), rtol=1e-4, atol=1e-4)
        fast, slow = small(x, src_key_padding_mask=mask), alds.compress(model, params=0.7)(x, src_key_padding_mask=mask)
    assert fast.shape == slow.shape == x.shape
