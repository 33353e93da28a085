"""Plan.apply(refit=): the best factors for what reaches a layer, BatchNorm statistics, masks, stages, refusals."""

import copy
import itertools

import pytest
import torch
from support.models import images, small_net
from support.population import analyze_population
from torch import nn

import alds_fast as alds
from alds_fast.blocks import BlockChain
from alds_fast.errors import ArgumentError, ModelError, PlanError
from alds_fast.factors.refitting import cross_sums, ridge, stages
from alds_fast.factors.refitting.batchnorm import move_statistics
from alds_fast.measurement import private_runs


def outputs_apart(model, small, x):
    with torch.no_grad():
        return float((model(x) - small(x)).norm() / model(x).norm())


def stages_of(model, x, names):
    with private_runs(model) as run:
        return [stage.calls for stage in stages.find_stages(stages.Network(model, run, BlockChain()), x, names, ())]


def linear_chain(*widths):
    torch.manual_seed(0)
    pairs = itertools.pairwise(widths)
    return nn.Sequential(*(nn.Linear(a, b) for a, b in pairs)).double()


def test_second_layer_reaches_the_minimum_written_out(monkeypatch):
    """min over V of rank r of E||y - y0 - V (x' - x'0)||^2 = E||y - y0||^2 - the r largest eigenvalues of B C^+ B^T."""
    monkeypatch.setattr(ridge, "RIDGES", (0.0,))
    monkeypatch.setattr(cross_sums.CrossSums, "noise", lambda sums: (0.0, 1.0))
    monkeypatch.setattr(cross_sums.CrossSums, "_apart", lambda sums, part: 0.0)
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(20, 18), nn.Tanh(), nn.Linear(18, 16)).double()
    x = torch.randn(300, 20).double()
    plan = alds.analyze(net, groups=(1,)).plan(params=0.5)
    small = plan.apply(net, refit=[x[:100], x[100:]])
    with torch.no_grad():
        reached, y = small[1](small[0](x)), net(x)
        reached, y = reached - reached.mean(0), y - y.mean(0)
        cross = y.T @ reached / len(x)
        energies = torch.linalg.eigvalsh(cross @ torch.linalg.pinv(reached.T @ reached / len(x)) @ cross.T).flip(0)
        least = y.square().sum() / len(x) - energies[: plan.layers[1].rank].sum()
        got = (net(x) - small(x)).square().sum() / len(x)
    assert torch.allclose(got, least, rtol=1e-9)
    report, plain = small.alds_factors["2"], (net(x) - net[2].bias).detach()
    assert report.method == "refitted"
    assert report.data_error == pytest.approx(float((got * len(x) / plain.square().sum()).sqrt()), rel=1e-6)
    assert outputs_apart(net, small, x) < 0.9 * outputs_apart(net, plan.apply(net), x)


def test_first_layer_is_as_the_data_criterion_has_it(monkeypatch):
    """Nothing is compressed before it: the weight that is truncated is its own."""
    monkeypatch.setattr(cross_sums.CrossSums, "noise", lambda sums: (0.0, 1.0))
    monkeypatch.setattr(cross_sums.CrossSums, "_apart", lambda sums, part: 0.0)
    net, x = linear_chain(24, 24, 24), torch.randn(400, 24).double()
    plan = analyze_population(net, data=[x]).plan(params=0.5)
    plain, fitted = plan.apply(net), plan.apply(net, refit=[x])
    assert torch.allclose(plain[0](x), fitted[0](x), atol=1e-9)
    assert fitted.alds_factors["0"].data_error == pytest.approx(plain.alds_factors["0"].data_error, rel=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("criterion", ["frobenius", "output", "sensitivity"])
def test_convolutions_of_all_folds_come_closer(criterion):
    net, data = small_net(), [images(32, seed) for seed in range(4)]
    analysis = alds.analyze(net, data=data, sensitivity=True)
    plan = analysis.plan(params=0.4, criterion=criterion)
    apart = {}
    for scheme in range(4):
        one = alds.analyze(net, schemes=(scheme,), groups=(1, 2), data=data, sensitivity=True)
        plan = one.plan(params=0.4, criterion=criterion)
        x = images(64, 9)
        apart[scheme] = outputs_apart(net, plan.apply(net, refit=data), x) / outputs_apart(net, plan.apply(net), x)
    assert max(apart.values()) < 1.02 and min(apart.values()) < 0.9, apart


def test_exactly_low_rank_weights_stay():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 32)).double()
    for layer in (net[0], net[2]):
        layer.weight.data = torch.randn(32, 6).double() @ torch.randn(6, 32).double()
    x = torch.randn(200, 32).double()
    plan = alds.analyze(net, groups=(1,)).plan(error=1e-6)
    assert [row.rank for row in plan.layers] == [6, 6]
    small = plan.apply(net, refit=[x])
    assert outputs_apart(net, small, x) < 1e-9


def test_models_are_left_as_they_were():
    net = small_net().train()
    plan = alds.analyze(net).plan(params=0.5)
    before = copy.deepcopy(net.state_dict())
    random = torch.get_rng_state()
    small = plan.apply(net, refit=[images()])
    assert all(torch.equal(before[k], v) for k, v in net.state_dict().items())
    assert all(m.training for m in net.modules()) and small.training
    assert torch.equal(random, torch.get_rng_state())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in (*net.modules(), *small.modules()))
    assert all(p.requires_grad for p in small.parameters())


def test_statistics_of_batchnorms_move_by_what_the_batches_move():
    net, x = small_net(), images(64)
    net[1].running_mean.normal_()
    same = copy.deepcopy(net)
    move_statistics(net, same, [x])
    assert torch.allclose(same[1].running_mean, net[1].running_mean)
    assert torch.allclose(same[1].running_var, net[1].running_var)
    with torch.no_grad():
        same[0].weight.mul_(2.0)
        same[0].bias.mul_(2.0).add_(1.0)
    move_statistics(net, same, [x[:32], x[32:]])
    seen = net[0](x).mean((0, 2, 3))
    assert torch.allclose(same[1].running_mean, net[1].running_mean + seen + 1.0, atol=1e-4)
    assert torch.allclose(same[1].running_var, 4 * net[1].running_var, rtol=1e-4)


class Heads(nn.Module):
    """Two layers that read one tensor, one that is called twice, one that is never called; takes a mask."""

    def __init__(self):
        super().__init__()
        self.q, self.k, self.twice, self.never = (nn.Linear(16, 16) for _ in range(4))

    def forward(self, x, attention_mask=None):
        hidden = self.q(x) * self.k(x).sigmoid()
        return self.twice(self.twice(hidden).relu())


def test_layers_that_read_one_tensor_share_a_pass():
    net = Heads()
    assert stages_of(net, torch.randn(4, 16), ["q", "k", "twice", "never"]) == [{"q": 1, "k": 1}, {"twice": 2}]


def test_a_layer_called_twice_and_one_never_called():
    torch.manual_seed(0)
    net, x = Heads(), torch.randn(100, 16)
    plan = alds.analyze(net).plan(params=0.6)
    small = plan.apply(net, refit=[x])
    ways = {name: report.method for name, report in small.alds_factors.items()}
    assert ways["twice"] == "refitted" and ways.get("never") != "refitted"
    assert outputs_apart(net, small, x) < outputs_apart(net, plan.apply(net), x)


def test_padding_does_not_count():
    torch.manual_seed(0)
    net, x = Heads(), torch.randn(6, 10, 16)
    mask = torch.arange(10) < torch.tensor([[4], [7], [10], [5], [9], [8]])
    plan = alds.analyze(net).plan(params=0.6)
    junk = torch.where(mask[:, :, None], x, 100 * torch.randn(6, 10, 16))
    clean, dirty = (plan.apply(net, refit=[{"x": t, "attention_mask": mask}]) for t in (x, junk))
    for name, value in clean.state_dict().items():
        assert torch.allclose(value, dirty.state_dict()[name], atol=1e-5), name
    blind = plan.apply(net, refit=[{"x": junk, "attention_mask": mask}], mask=None)
    assert not torch.allclose(blind.twice.decoder, clean.twice.decoder, atol=1e-2)


def _normed():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, 16)).eval()


def test_a_batch_of_one_sample_has_no_variance():
    """It counts for the factors; the statistics move as without it."""
    net, x = _normed(), torch.randn(64, 16)
    small = alds.analyze(net).plan(params=0.6).apply(net, refit=[x[:63], x[63:]])
    moved = alds.analyze(net).plan(params=0.6).apply(net)
    moved[0].load_state_dict(small[0].state_dict())
    move_statistics(net, moved, [x[:63]])
    torch.testing.assert_close(moved[1].running_var, small[1].running_var, rtol=0, atol=0)
    assert not torch.equal(small[1].running_var, net[1].running_var)


def test_nan_before_a_batchnorm_is_refused():
    net, x = _normed(), torch.randn(64, 16)
    x[0, 0] = torch.nan
    plan = alds.analyze(net, exclude=["0", "3"]).plan(params=1.0)
    with pytest.raises(ModelError, match="BatchNorm '1' sees NaN"):
        plan.apply(net, refit=[x])


@pytest.mark.parametrize("outside", [True, False])
def test_models_and_calls_in_inference_mode(outside):
    """Inference tensors have no version and cannot be saved and put back; nothing of the user's may change."""
    x = torch.randn(64, 16)
    plan = alds.analyze(_normed()).plan(params=0.6)
    expected = plan.apply(_normed(), refit=[x])
    with torch.inference_mode():
        net = _normed()
        small = plan.apply(net, refit=[x]) if not outside else None
    small = plan.apply(net, refit=[x]) if outside else small
    torch.testing.assert_close(net.state_dict(), _normed().state_dict(), rtol=0, atol=0)
    torch.testing.assert_close(small.state_dict(), expected.state_dict())
    assert len(alds.analyze(net, data=[x]).layers) == 2


def test_batchnorms_without_a_count_of_batches():
    """As old checkpoints have them."""
    net = _normed()
    net[1].num_batches_tracked = None
    small = alds.analyze(net).plan(params=0.6).apply(net, refit=[torch.randn(64, 16)])
    assert not torch.equal(small[1].running_mean, net[1].running_mean)


class _Experts(nn.Module):
    """Every token goes to one of two experts, by what the first layer says."""

    def __init__(self):
        super().__init__()
        self.first, self.experts = nn.Linear(16, 16), nn.ModuleList(nn.Linear(16, 16) for _ in range(2))

    def forward(self, x):
        h = self.first(x)
        out, to = torch.zeros_like(h), (h[:, 0] > 0).long()
        for i, expert in enumerate(self.experts):
            out[to == i] = expert(h[to == i])
        return out


def test_experts_that_get_other_rows_are_left_alone():
    torch.manual_seed(0)
    net = _Experts()
    small = alds.analyze(net).plan(params=0.5).apply(net, refit=[torch.randn(256, 16)])
    methods = {name: report.method for name, report in small.alds_factors.items()}
    assert methods.pop("first") == "refitted" and "refitted" not in methods.values()


def test_an_input_changed_in_place_is_another_stage():
    class Residual(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList(nn.Linear(16, 16) for _ in range(3))

        def forward(self, x):
            x = x.clone()
            for layer in self.layers:
                x += layer(x).relu()
            return x

    assert stages_of(Residual(), torch.randn(4, 16), [f"layers.{i}" for i in range(3)]) == [
        {f"layers.{i}": 1} for i in range(3)
    ]


def test_outputs_changed_in_place_are_fitted_as_the_layer_gave_them():
    class Scaled(nn.Module):
        def __init__(self, in_place):
            super().__init__()
            self.q, self.k = (nn.Linear(16, 16, bias=False) for _ in range(2))
            self.in_place = in_place

        def forward(self, x):
            q = self.q(x)
            q = q.mul_(0.2) if self.in_place else q * 0.2
            return q + self.k(x)

    nets, x = [Scaled(False), Scaled(True)], torch.randn(64, 16)
    nets[1].load_state_dict(nets[0].state_dict())
    plan = alds.analyze(nets[0]).plan(params=0.6)
    plain, in_place = (plan.apply(net, refit=[x]).state_dict() for net in nets)
    torch.testing.assert_close(in_place, plain, rtol=0, atol=0)


def test_a_loader_leaves_the_random_state():
    net, x = _normed(), torch.utils.data.DataLoader(torch.randn(64, 16), 16, shuffle=True)
    before = torch.random.get_rng_state()
    alds.analyze(net).plan(params=0.6).apply(net, refit=x)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_bias_correction_can_be_left_off():
    net, x = _normed(), torch.randn(64, 16)
    small = alds.analyze(net).plan(params=0.6, bias_correction=False).apply(net, refit=[x])
    assert torch.equal(small[0].bias, net[0].bias) and torch.equal(small[3].bias, net[3].bias)


def test_batches_of_nothing_but_padding():
    """One such batch changes nothing; where there is no other, the layers stay as they are."""
    torch.manual_seed(0)
    net, mask = Heads(), torch.ones(6, 10)
    batch, padding = ({"x": torch.randn(6, 10, 16), "attention_mask": kept} for kept in (mask, 0 * mask))
    plan = alds.analyze(net).plan(params=0.6)
    for data, expected in (([batch, padding], plan.apply(net, refit=[batch])), ([padding], plan.apply(net))):
        torch.testing.assert_close(plan.apply(net, refit=data).state_dict(), expected.state_dict(), rtol=0, atol=0)


def test_dead_and_few_samples():
    net = small_net()
    plan = alds.analyze(net).plan(params=0.5)
    for batch in (torch.zeros(4, 3, 12, 12), images(2)):
        small = plan.apply(net, refit=[batch])
        assert all(p.isfinite().all() for p in small.state_dict().values())
        assert small(images()).isfinite().all()


def test_a_model_that_swallows_exceptions_is_stopped_all_the_same():
    class Careful(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = linear_chain(16, 16, 16)

        def forward(self, x):
            try:
                return self.net(x)
            except Exception:
                return x

    net, x = Careful(), torch.randn(50, 16).double()
    small = alds.analyze(net).plan(params=0.6).apply(net, refit=[x])
    assert {r.method for r in small.alds_factors.values()} == {"refitted"}


class Once:
    """Looks like a list of batches, and can be gone through once."""

    def __init__(self, data):
        self.data = iter(data)

    def __iter__(self):
        yield from self.data


def test_an_encoder_with_padded_tokens():
    """In torch's own encoder, whose nested tensors leave padded tokens out."""
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, dropout=0.0)
    net = nn.TransformerEncoder(layer, 2).eval()
    padding = torch.arange(5) >= torch.tensor([[5], [3], [4]]).repeat(20, 1)
    batch = {"src": torch.randn(60, 5, 8), "src_key_padding_mask": padding}
    small = alds.analyze(net, data=[batch]).plan(params=0.8).apply(net, refit=[batch])
    assert {r.method for r in small.alds_factors.values()} == {"refitted"}
    assert net.use_nested_tensor and small(**batch).isfinite().all()


@pytest.mark.parametrize(
    ("data", "error", "message"),
    [
        (iter([images()]), ArgumentError, "iterator"),
        (images(), ArgumentError, "refit= is a Tensor"),
        ([], ArgumentError, "no batches"),
        (3, ArgumentError, "refit= is a int"),
        ([3], ArgumentError, "batch 1 of refit= is a int"),
        (Once(images(4, seed) for seed in range(4)), ArgumentError, "and then none"),
        ([torch.full((2, 3, 12, 12), torch.nan)], ModelError, "NaN"),
        ([torch.randn(2, 5, 12, 12)], ModelError, "batch"),
    ],
)
def test_refusals(data, error, message):
    net = small_net()
    plan = alds.analyze(net).plan(params=0.5)
    with pytest.raises(error, match=message):
        plan.apply(net, refit=data)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in net.modules())


@pytest.mark.slow
def test_compress_and_evaluate_take_it():
    net, data, x = small_net(), [images(32, 3), images(32, 4)], images(64, 5)
    plain = alds.compress(net, params=0.4, data=data)
    fitted = alds.compress(net, params=0.4, data=data, refit=True)
    assert outputs_apart(net, fitted, x) < outputs_apart(net, plain, x)
    with pytest.raises(ArgumentError, match="refit=True: data= is a NoneType"):
        alds.compress(net, params=0.4, refit=True)
    variants = {"plain": {"data": True}, "fitted": {"data": True, "refit": True}, "free": {"refit": True}}
    quality = lambda m: -outputs_apart(net, m, x)  # noqa: E731
    table = alds.evaluate(net, quality, budgets=[0.4], variants=variants, data=lambda seed: iter(data))
    assert table.rows[1]["quality"] > table.rows[0]["quality"] and table.rows[2]["status"] == "done"
    assert table.rows[1]["quality"] == pytest.approx(quality(fitted), abs=1e-6)
    with pytest.raises(ArgumentError, match="refit=True or refine=: give data="):
        alds.evaluate(net, quality, variants={"free": {"refit": True}})
    with pytest.raises(ArgumentError, match="refit=1"):
        alds.evaluate(net, quality, variants={"free": {"refit": 1}}, data=lambda seed: data)


def test_compress_takes_only_true_or_false():
    with pytest.raises(ArgumentError, match=r"refit is a Tensor: True or False.*Plan.apply\(refit=\)"):
        alds.compress(_normed(), params=0.6, refit=torch.randn(64, 16))


def test_moments_that_do_not_fit_the_criterion():
    net, x = _normed(), torch.randn(64, 16)
    plan = alds.analyze(net, data=[x], sensitivity=True).plan(params=0.6)
    with pytest.raises(PlanError, match="moments is a Analysis; pass analysis.moments"):
        plan.apply(net, moments=alds.analyze(net, data=[x]))
    with pytest.raises(PlanError, match="layer '0': criterion 'sensitivity' needs moments"):
        plan.apply(net, moments=alds.analyze(net, data=[x]).moments)


def test_statistics_stay_where_the_batches_tell_nothing():
    net = small_net()
    plan = alds.analyze(net).plan(params=0.5)
    plain = plan.apply(net)
    with pytest.warns(UserWarning, match="refit= left"):
        same = plan.apply(net, refit=[torch.ones(8, 3, 12, 12)])
    assert torch.equal(same[1].running_var, plain[1].running_var)
