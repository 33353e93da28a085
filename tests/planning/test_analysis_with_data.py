"""Plans from data: criteria, defaults, bias correction, importance, JSON, saving, the PCA baseline, errors."""

import dataclasses
import math

import pytest
import torch
from support.models import count, images, small_net
from support.population import analyze_population
from torch import nn

import alds_fast as alds
from alds_fast.criteria import errors_by_rank
from alds_fast.criteria.weighted_errors import errors
from alds_fast.errors import ArgumentError, LayerNotFoundError, PlanError
from alds_fast.factors.weighted import factors
from alds_fast.linalg import Decomposition


@pytest.fixture(scope="module")
def net():
    return small_net()


@pytest.fixture(scope="module")
def analysis(net):
    return alds.analyze(net, data=[images(16, 3), images(16, 4)], sensitivity=True)


def relative_output_error(net, small, name, x):
    """||W x - W_hat x|| / ||W x|| of a layer on the inputs that it gets in the dense network, biases left out."""
    seen = []
    handle = net.get_submodule(name).register_forward_pre_hook(lambda m, a: seen.append(a[0]))
    with torch.no_grad():
        net(x)
        handle.remove()
        dense, cut = net.get_submodule(name), small.get_submodule(name)
        plain = [m(seen[0]) - m(torch.zeros_like(seen[0])) for m in (dense, cut)]
    return float((plain[0] - plain[1]).norm() / plain[0].norm())


def test_output_errors_are_those_of_the_layers_outputs():
    """On one slice, no bias correction, all patches seen: exact for every layer of the plan."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(20, 30), nn.ReLU(), nn.Linear(30, 30), nn.ReLU(), nn.Linear(30, 25)).double()
    x = torch.randn(200, 20).double()
    plan = analyze_population(net, data=x.split(50)).plan(params=0.5, bias_correction=False)
    assert plan.criterion == "output" and not plan.bias_correction
    small, reduced = plan.apply(net), [row for row in plan.layers if row.rank]
    assert len(reduced) >= 2
    for row in reduced:
        measured = relative_output_error(net, small, row.name, x)
        assert measured == pytest.approx(small.alds_factors[row.name].data_error, rel=1e-6)
        assert measured <= row.error * (1 + 1e-6)


def test_bias_correction_gives_outputs_their_mean():
    torch.manual_seed(0)
    net, x = nn.Sequential(nn.Linear(20, 30)).double(), torch.randn(100, 20).double() + 1
    analysis = analyze_population(net, data=[x])
    for correct in (True, False):
        small = analysis.plan(params=0.4, bias_correction=correct).apply(net)
        off = float((net(x) - small(x)).mean(0).abs().max().detach())
        assert off < 1e-9 if correct else off > 1e-3
    assert analysis.plan(params=0.4).error <= analysis.plan(params=0.4, bias_correction=False).error


def test_a_bias_that_is_shared_is_left_alone():
    torch.manual_seed(0)
    net, x = nn.Sequential(nn.Linear(12, 12), nn.ReLU(), nn.Linear(12, 12)), torch.randn(50, 12) + 1
    net[2].bias = net[0].bias
    small = alds.analyze(net, data=[x]).plan(params=0.5).apply(net)
    assert small[0].bias is small[2].bias and torch.equal(small[0].bias, net[0].bias)


def test_defaults_follow_what_was_collected(net, analysis):
    plan = analysis.plan(params=0.5)
    assert (plan.criterion, plan.p, plan.bias_correction) == ("sensitivity", 2.0, True)
    assert analysis.plan(params=0.5, method="svd").criterion == "frobenius"
    assert analysis.plan(params=0.5, method="pca").criterion == "output"
    seen = alds.analyze(net, data=[images(8)]).plan(params=0.5)
    assert (seen.criterion, seen.p) == ("output", 4.0)
    plain = alds.analyze(net)
    assert (plain.plan(params=0.5).criterion, plain.plan(params=0.5).p) == ("frobenius", 4.0)
    assert math.isinf(plain.plan(error=0.5).p) and math.isinf(plain.plan(params=0.5, method="svd").p)


@pytest.mark.parametrize("criterion", ["output", "output-bound", "sensitivity"])
def test_every_criterion_plans_and_applies(net, analysis, criterion):
    plan = analysis.plan(params=0.5, criterion=criterion)
    small = plan.apply(net)
    assert count(small) == plan.params <= 0.5 * analysis.params
    for name, report in small.alds_factors.items():
        row = next(row for row in plan.layers if row.name == name)
        assert report.method == "weighted" and report.data_error <= row.error * (1 + 1e-6) + 1e-9
    assert torch.isfinite(small(images())).all()


def test_a_plan_from_json_needs_the_moments(net, analysis):
    plan = analysis.plan(params=0.5)
    reread = alds.Plan.from_json(plan.to_json())
    assert reread == plan
    with pytest.raises(PlanError, match=r"criterion 'sensitivity' needs moments.* moments=analysis.moments"):
        reread.apply(net)
    x = images()
    assert torch.equal(reread.apply(net, moments=analysis.moments)(x), plan.apply(net)(x))
    text = plan.to_json().replace('"bias_correction": true', '"bias_correction": 3')
    with pytest.raises(PlanError, match="bias_correction=3 is not true or false"):
        alds.Plan.from_json(text)


def test_printed_it_says_what_it_has_of_the_data(net, analysis):
    rows = max(moments.rows for moments in analysis.moments.values())
    last = str(analysis).splitlines()[-1]
    assert f"data: what {len(analysis.moments)} layers read, {rows:,} rows at most; gradients at" in last
    assert "data:" not in str(alds.analyze(net))


def test_saved_and_loaded(net, analysis, tmp_path):
    small = analysis.plan(params=0.5).apply(net)
    alds.save(small, tmp_path / "small.safetensors")
    loaded = alds.load(tmp_path / "small.safetensors", net)
    assert torch.equal(loaded(images()), small(images())) and loaded.alds_plan.criterion == "sensitivity"


def test_importance_moves_the_budget():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(40, 40, bias=False), nn.Linear(40, 40, bias=False))
    analysis = alds.analyze(net, groups=(1,))
    even = {row.name: row.rank for row in analysis.plan(params=0.5).layers}
    tilted = {row.name: row.rank for row in analysis.plan(params=0.5, importance={"0": 10.0}).layers}
    assert tilted["0"] is None or tilted["0"] > even["0"]
    assert tilted["1"] < even["1"]


def test_a_layer_that_data_never_reach_is_judged_by_its_weight():
    class Branch(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.idle = nn.Linear(20, 20), nn.Linear(20, 20)

        def forward(self, x):
            return self.used(x)

    net, batches = Branch(), [torch.randn(60, 20)]
    plan = alds.analyze(net, data=batches).plan(params=0.5, criterion="output")
    used, idle = plan.layers
    assert (used.criterion, used.remark, idle.criterion) == (None, None, "frobenius") and used.rank and idle.rank
    assert idle.remark == "no data reached it: judged by 'frobenius'" and idle.remark in str(plan)
    small = plan.apply(net, refit=batches)
    lost = net.idle.weight - small.idle.dense_weight()
    assert float((lost.norm() / net.idle.weight.norm()).detach()) == pytest.approx(idle.error, rel=1e-5)
    read = alds.Plan.from_json(plan.to_json())
    assert read == plan
    with pytest.raises(PlanError, match="layer 'used': criterion 'output' needs moments"):
        read.apply(net)


class TwoHeads(nn.Module):
    """What is returned first does not depend on the second head."""

    def __init__(self):
        super().__init__()
        self.body, self.first, self.second = nn.Linear(24, 24), nn.Linear(24, 24), nn.Linear(24, 16)

    def forward(self, x):
        hidden = self.body(x).relu()
        return self.first(hidden), self.second(hidden)


def test_a_layer_that_what_matters_does_not_depend_on_is_judged_by_its_output():
    torch.manual_seed(0)
    net, x = TwoHeads(), torch.randn(64, 24)
    analysis = alds.analyze(net, data=[x], sensitivity=True)
    assert not analysis.moments["second"].gradient.any()
    plan, by_output = analysis.plan(params=0.7), alds.analyze(net, data=[x])
    rows = {row.name: row for row in plan.layers}
    if rows["second"].rank is not None:
        assert rows["second"].remark == "no gradient reached it: judged by 'output'" and rows["first"].remark is None
        of_output = by_output._basis("output", True)
        (errors,) = by_output._errors_of([by_output.layers[2]], of_output, False)
        assert any(rows["second"].error in of_ranks.tolist() for of_ranks in errors.values())
    assert rows["first"].error > 0 and all(y.isfinite().all() for y in plan.apply(net)(x))


def test_a_network_whose_output_is_zero_is_judged_by_its_layers_outputs():
    net = nn.Sequential(nn.Linear(24, 24), nn.ReLU(), nn.Linear(24, 10))
    nn.init.zeros_(net[2].weight), nn.init.zeros_(net[2].bias)
    small = alds.compress(net, params=0.7, data=[torch.randn(64, 24)], sensitivity=True, refit=True)
    rows = {row.name: row for row in small.alds_plan.layers}
    assert rows["0"].criterion == "output" and 0 < rows["0"].error < 1


def test_no_more_than_eight_slices_unless_asked_for():
    net, x = nn.Sequential(nn.Conv2d(16, 16, 3), nn.ReLU()), torch.randn(4, 16, 6, 6)
    plan = alds.analyze(net, data=[x]).plan(params=0.5)
    assert plan.layers[0].groups <= 8
    assert alds.analyze(net, groups=(16,), data=[x]).plan(params=0.6).layers[0].groups == 16


def test_large_linear_layers_have_one_slice_with_data_unless_asked_for(monkeypatch):
    torch.manual_seed(0)
    net, x = nn.Sequential(nn.Linear(32, 48)), [torch.randn(256, 32)]
    with torch.no_grad():  # each half of the channels goes along two directions of its own
        net[0].weight.copy_(torch.cat([torch.randn(48, 2) @ torch.randn(2, 16) for _ in range(2)], 1))

    def slices(**options):
        return alds.analyze(net, **options).plan(params=0.2).layers[0].groups

    assert (slices(), slices(data=x)) == (2, 2)
    monkeypatch.setattr(errors_by_rank, "LARGE", 32 * 48 - 1)
    assert (slices(), slices(data=x), slices(data=x, groups=(1, 2))) == (2, 1, 2)


def test_pca_by_hand():
    """Two diagonal layers on inputs of known variances: the outputs' covariances are diagonal, too.

    Layer 0 has variances 8, 1, .5, .1 and layer 1 of its own 4, 4, 4, 4 after a diagonal scaling; rank 1 costs 8 of 16
    in each. At half of the parameters both must go to rank 1: 8 + 8 = 16 of 32.
    """
    first, second = torch.tensor([8.0, 1.0, 0.5, 0.1]).double(), torch.tensor([0.5, 4.0, 8.0, 40.0]).double()
    net = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)).double()
    with torch.no_grad():
        net[0].weight.copy_(torch.eye(4))
        net[1].weight.copy_(torch.diag(second.sqrt()))
    signs = torch.cartesian_prod(*[torch.tensor([-1.0, 1.0]).double()] * 4)
    analysis = analyze_population(net, data=[signs * first.sqrt()])
    plan = analysis.plan(params=0.5, method="pca")
    assert [(row.scheme, row.groups, row.rank) for row in plan.layers] == [(0, 1, 1)] * 2
    # errors: sqrt of the share of energy lost; layer 1 has energies 4, 4, 4, 4
    assert [row.error for row in plan.layers] == pytest.approx([math.sqrt(1.6 / 9.6), math.sqrt(12 / 16)])
    small = plan.apply(net)
    kept = small[0].dense_weight()
    torch.testing.assert_close(kept, torch.diag(torch.tensor([1.0, 0, 0, 0]).double()), atol=1e-12, rtol=0)
    with pytest.raises(ArgumentError, match="is made for criterion='output', not 'operator'"):
        analysis.plan(params=0.5, method="pca", criterion="operator")


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"criterion": "output"}, ArgumentError, r"criterion='output' needs data: analyze\(model, data=batches\)"),
        ({"criterion": "sensitivity"}, ArgumentError, "needs gradients"),
        ({"criterion": "entropy"}, ArgumentError, "criterion='entropy' is not one of frobenius, .*sensitivity"),
        ({"method": "pca"}, ArgumentError, "method='pca' needs data"),
        ({"bias_correction": 1}, ArgumentError, "bias_correction=1 is not True or False"),
        ({"importance": [1]}, ArgumentError, "importance is a list"),
        ({"importance": {"8": -1}}, ArgumentError, r"importance\['8'\]=-1 is outside"),
        ({"importance": {"nope": 1}}, LayerNotFoundError, "importance='nope' matches no layer"),
    ],
)
def test_refusals(net, options, error, message):
    with pytest.raises(error, match=message):
        alds.analyze(net).plan(params=0.5, **options)


def test_compress_takes_data(net):
    small = alds.compress(net, params=0.5, data=[images(8)], criterion="output", p=4)
    assert small.alds_plan.p == 4 and small.alds_plan.criterion == "output"


def test_pca_goes_by_the_covariance():
    """A mean of 100 in the first output is no variance: the bias takes it up, and the rank goes to another output."""
    net = nn.Linear(3, 3).double()
    with torch.no_grad():
        net.weight.copy_(torch.eye(3))
        net.bias.zero_()
    signs = torch.cartesian_prod(*[torch.tensor([-1.0, 1.0]).double()] * 3)
    analysis = analyze_population(net, data=[signs * torch.tensor([0.1, 2.0, 1.0]) + torch.tensor([100.0, 0.0, 0.0])])
    plan = analysis.plan(params=0.75, method="pca")
    assert plan.layers[0].rank == 1
    small = plan.apply(net)
    torch.testing.assert_close(small.dense_weight(), torch.diag(torch.tensor([0.0, 1.0, 0.0]).double()))
    torch.testing.assert_close(small.bias.detach(), torch.tensor([100.0, 0.0, 0.0]).double())


class Tokens(nn.Module):
    """Two layers over tokens in a layout of choice."""

    def __init__(self, layout):
        super().__init__()
        self.layout, self.first = layout, nn.Linear(6, 5)

    def forward(self, x, attention_mask):
        x = x.flatten(0, 1) if self.layout == "flat" else x.transpose(0, 1) if self.layout == "time first" else x
        return self.first(x)


@pytest.mark.parametrize("layout", ["batch first", "flat", "time first"])
def test_padding_does_not_count_in_any_layout(layout):
    x, mask = torch.randn(3, 7, 6), torch.ones(3, 7)
    mask[0, 4:] = mask[2, 1:] = 0
    x[mask == 0] = 1e6
    for held_out in (0, 0.4):  # of three samples one is kept aside, the last
        analysis = alds.analyze(Tokens(layout), data=[{"x": x, "attention_mask": mask}], held_out=held_out)
        moments, last = analysis.moments["first"], torch.arange(3)[:, None] == 2 if held_out else torch.zeros(1)
        rows, held = x[(mask == 1) & (last == 0)].double(), x[(mask == 1) & (last == 1)]
        assert moments.rows == len(rows) == 12 - len(held)
        torch.testing.assert_close(moments.second[0], rows.T @ rows / len(rows), rtol=1e-5, atol=1e-6)
        assert moments.held is None if not held_out else torch.equal(moments.held[:, 0], held)


@pytest.mark.parametrize(
    ("batch", "options", "message"),
    [
        ({"attention_mask": torch.tensor([[0.0, -1e9]])}, {}, r"expected \(samples, tokens\) of 1 or True"),
        ({"attention_mask": torch.full((1, 1, 2, 2), 2)}, {}, r"got shape \(1, 1, 2, 2\)"),
        ({"attention_mask": torch.ones(1, 2)}, {"mask": "padding"}, "mask='padding' is an argument of no batch"),
        ({"attention_mask": torch.zeros(1, 2)}, {}, "reaches none of the layers"),
    ],
)
def test_masks_that_are_none(batch, options, message):
    with pytest.raises(ArgumentError, match=message):
        alds.analyze(Tokens("batch first"), data=[{"x": torch.randn(1, 2, 6), **batch}], **options)


def test_data_that_reach_nothing_are_refused():
    net = nn.Linear(6, 5)
    with pytest.raises(ArgumentError, match="reaches none of the layers"):
        alds.compress(net, params=0.5, data=[torch.zeros(0, 6)])


def test_layers_that_see_only_zeros_are_named():
    net = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 4))
    nn.init.constant_(net[1].bias, -1e3)
    with pytest.warns(UserWarning, match="1 of 3 layers see nothing but zeros of data=, '3' for one"):
        analysis = alds.analyze(net, data=[torch.randn(9, 6)])
    assert analysis.plan(params=0.99, min_rank=1).layers[2].error == 0.0


def changed(net, small, x):
    with torch.no_grad():
        return float((net(x) - small(x)).norm() / net(x).norm())


@pytest.mark.slow
def test_few_patches_do_not_ruin_a_convolution():
    """6,272 patches of 1,152 entries from one batch: more parameters lose less, on the batch and on others."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 128, 3, padding=1), nn.ReLU(), nn.Conv2d(128, 128, 3, padding=1, bias=False))
    x, fresh = torch.randn(32, 3, 14, 14), torch.randn(8, 3, 14, 14)
    analysis = alds.analyze(net, data=[x], include="2")
    plans = [analysis.plan(params=keep) for keep in (0.7, 0.3)]
    for data in (x, fresh):
        lost = [changed(net, plan.apply(net), data) for plan in plans]
        assert lost[0] < 0.25 and lost[0] < lost[1] < 0.45
    assert changed(net, plans[0].apply(net, refit=[x]), fresh) < 0.3


@pytest.mark.slow
@pytest.mark.parametrize("samples", [16, 64])
@pytest.mark.parametrize("sensitivity", [False, True])
@pytest.mark.parametrize("keep", [0.5, 0.15])
def test_few_samples_do_not_blow_up(samples, sensitivity, keep):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 10))
    data, fresh = [torch.randn(samples, 256)], torch.randn(500, 256)
    analysis = alds.analyze(net, data=data, sensitivity=sensitivity)
    for options in ({}, {"p": 2.0}, {"criterion": "output", "p": 2.0}):
        small = analysis.plan(params=keep, **options).apply(net)
        assert changed(net, small, fresh) < 1.25  # leaving a layer out altogether is 1


def test_rows_far_from_zero_keep_their_spread():
    x = 0.1 * torch.randn(400, 8) + 1000.0
    second, mean = (m := analyze_population(nn.Linear(8, 8), data=[x[:100], x[100:]]).moments[""]).second[0], m.mean[0]
    true = torch.cov(x.double().T, correction=0)
    torch.testing.assert_close(second - mean.outer(mean), true, rtol=1e-4, atol=1e-6)


def test_noise_of_moments_is_their_variance():
    """Batches of independent rows: the estimate is right on average, however unequal the batches."""
    torch.manual_seed(0)
    mix, net = torch.randn(12, 12), nn.Linear(12, 4)
    true = (mix @ mix.T).double()
    estimates, distances = [], []
    for _ in range(60):
        x = torch.randn(100, 12) @ mix.T
        moments = alds.analyze(net, data=list(x.split([40, 35, 20, 5])), held_out=0).moments[""]
        covariance = moments.second[0] - moments.mean[0].outer(moments.mean[0])
        estimates.append(moments.noise)
        distances.append(float((covariance - true).square().sum()))
    assert 0.8 < sum(estimates) / sum(distances) < 1.25


def test_a_second_plan_solves_nothing_again(monkeypatch):
    net = small_net()
    analysis = alds.analyze(net, data=[images(16)])
    solved, eigh = [], torch.linalg.eigh
    monkeypatch.setattr(torch.linalg, "eigh", lambda *args, **kwargs: solved.append(1) or eigh(*args, **kwargs))
    first = analysis.plan(params=0.6)
    assert solved
    solved.clear()
    assert analysis.plan(params=0.6).to_json() == first.to_json()
    assert not solved
    assert analysis.plan(params=0.5).params < first.params
    assert len(solved) <= len(first.layers)  # of new folds the errors on samples kept aside


class _Stream(torch.utils.data.IterableDataset):
    def __iter__(self):
        yield from images(8)


@pytest.mark.parametrize(
    "form, length", [(list, 2), (iter, 2), (lambda b: (x for x in b), 0)], ids=["list", "iter", "generator"]
)
def test_progress_is_told_with_data_of_any_form(form, length):
    told = []
    alds.analyze(small_net(), data=form([images(4), images(4)]), progress=lambda *what: told.append(what))
    assert [what for what in told if what[0] == "moments"] == [("moments", 1, length), ("moments", 2, length)]
    done = [(done, total) for what, done, total in told if what == "spectra"]
    assert done == sorted(done) and done[-1][0] == done[-1][1] > 0


def test_a_loader_that_does_not_know_its_length():
    loader, told = torch.utils.data.DataLoader(_Stream(), batch_size=4), []
    alds.analyze(small_net(), data=loader, progress=lambda *what: told.append(what))
    assert told[-2:] == [("moments", 1, 0), ("moments", 2, 0)]


def test_the_plan_on_a_model_carries_no_data(tmp_path):
    net, batches = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64)), [torch.randn(32, 64)]
    sizes = []
    for options in ({}, {"data": batches, "sensitivity": True}):
        small = alds.compress(net, params=0.5, p=2, groups=(1,), **options)
        assert small.alds_plan.basis is None and not small.alds_plan.spectra
        torch.save(small, tmp_path / "small.pt")
        sizes.append((tmp_path / "small.pt").stat().st_size)
    assert sizes[1] < 1.1 * sizes[0]


def wide(outputs=3000):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, outputs))


def test_gradients_of_many_outputs_are_a_diagonal_and_the_plan_says_so():
    net, x = wide(), torch.randn(256, 32)
    analysis = alds.analyze(net, data=[x], sensitivity=True)
    whole, diagonal = analysis.moments["0"].gradient, analysis.moments["2"].gradient
    assert whole.shape == (1, 32, 32) and diagonal.shape == (1, 3000)
    plan = analysis.plan(params=0.5)
    assert plan.layers[1].remark == "its gradients are known as a diagonal" and plan.layers[1].remark in str(plan)
    assert alds.Plan.from_json(plan.to_json()) == plan
    small = plan.apply(net, refit=[x])
    with torch.no_grad():
        assert float((small(x) - net(x)).norm() / net(x).norm()) < 0.9


def test_a_diagonal_is_that_of_the_whole_moment(monkeypatch):
    net, x = wide(40), torch.randn(64, 32)
    whole = alds.analyze(net, data=list(x.split(16)), sensitivity=True).moments["2"]
    monkeypatch.setattr("alds_fast.criteria.moments.hooks.WIDEST_WHOLE", 39)
    narrow = alds.analyze(net, data=list(x.split(16)), sensitivity=True)
    diagonal = narrow.moments["2"].gradient
    torch.testing.assert_close(diagonal, whole.gradient.diagonal(dim1=1, dim2=2), rtol=1e-5, atol=1e-12)
    basis = narrow._basis("sensitivity", True)
    layer = narrow.spectra["2"].layer
    root = basis.weighting(layer).root
    as_matrix = dataclasses.replace(basis.weighting(layer), root=root.diag_embed())
    for fold in ((0, 1), (0, 2)):
        expected = errors(as_matrix, *fold)
        torch.testing.assert_close(errors(basis.weighting(layer), *fold), expected, rtol=1e-9, atol=1e-12)
    decomposition = Decomposition(0, 2, 5)
    diagonal, matrix = (factors(w, decomposition) for w in (basis.weighting(layer), as_matrix))
    torch.testing.assert_close(diagonal.left @ diagonal.right, matrix.left @ matrix.right)
    torch.testing.assert_close(diagonal.shift, matrix.shift)


def test_moments_are_bounded_and_what_is_reduced_is_said():
    net, x = wide(200), torch.randn(64, 32)
    needed = 8 * (32**2 + 32**2 + 32**2 + 200**2)
    analysis = alds.analyze(net, data=[x], sensitivity=True, moment_memory=needed)
    assert analysis.moments["2"].gradient.dim() == 3
    with pytest.warns(UserWarning, match=r"moment_memory= allows .* the gradients of 1 layers are kept as a diagonal"):
        reduced = alds.analyze(net, data=[x], sensitivity=True, moment_memory=needed - 1)
    assert reduced.moments["2"].gradient.dim() == 2 and reduced.moments["0"].gradient.dim() == 3
    with pytest.warns(UserWarning, match="1 layers, '2' for one, are judged by their weights"):
        smallest = alds.analyze(net, data=[x], sensitivity=True, moment_memory=8 * (32**2 + 32))
    assert set(smallest.moments) == {"0"} and smallest.plan(params=0.6).layers[1].criterion == "frobenius"
    with pytest.raises(ArgumentError, match="moment_memory=0 is not a number of bytes >= 1"):
        alds.analyze(net, data=[x], moment_memory=0)
