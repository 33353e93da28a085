"""Budgets on latency, with a timer whose costs are known: no real time decides a test."""

import json
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.marks import slow
from support.models import count, images, small_net
from torch import nn

import alds_fast as alds
from alds_fast.allocation import CostTable, candidates, corrected_limit
from alds_fast.allocation.latency import LayerTimes, layer_times
from alds_fast.allocation.latency.layer_times import call_key, interpolate
from alds_fast.allocation.latency.random_models import random_low_rank
from alds_fast.criteria import Basis, layer_errors
from alds_fast.errors import BudgetError, ModelError, PlanError
from alds_fast.layers import LowRankLayer
from alds_fast.linalg import Decomposition, index_count
from alds_fast.measurement import InputSpec, Timed, Timings, layer_inputs
from alds_fast.measurement.timing import timer as timer_module

CPU = torch.device("cpu")


class Timer:
    """Milliseconds by the number of weights: low-rank layers cost 10 us more, and ``slower`` times it in a model."""

    def __init__(self, slower=1.0, fixed=0.2):
        self.slower, self.fixed, self.timed = slower, fixed, []

    def layer(self, module):
        if isinstance(module, LowRankLayer):
            return 0.01 + 1e-4 * (module.encoder.numel() + module.decoder.numel())
        return 1e-4 * module.weight.numel() if isinstance(module, nn.Linear | nn.Conv2d) else 0.0

    def model(self, model):
        parts = [(m, self.layer(m)) for m in model.modules()]
        return self.fixed + sum(c * (self.slower if isinstance(m, LowRankLayer) else 1.0) for m, c in parts)

    def parts(self, run, modules, *, rounds, repeats, steady):
        model, inputs = run.args
        calls = layer_inputs(model, inputs, modules)
        ms = {(name, spec): n * self.layer(modules[name]) for name, specs in calls.items() for spec, n in specs.items()}
        return self.model(model), ms

    def __call__(self, calls, device, *, rounds=7, min_ms=2.0):
        times = {}
        for name, call in calls.items():
            whole = call.func is layer_times.call_model
            times[name] = [self.model(call.args[0]) if whole else self.layer(call.func)] * rounds
            if isinstance(call.func, LowRankLayer):
                self.timed.append((call.func.weight_shape, *call.func.decomposition))
        return times


def use(monkeypatch, timer):
    for module in (layer_times, timer_module):
        monkeypatch.setattr(module, "interleaved_ms", timer)
    monkeypatch.setattr(layer_times, "ms_by_part", timer.parts)


@pytest.fixture
def timer(monkeypatch):
    timer = Timer()
    use(monkeypatch, timer)
    return timer


def net():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 32, 3, padding=1), nn.ReLU(),
        nn.Conv2d(32, 32, 3, padding=1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 64),
    ).eval()  # fmt: skip


def plan(timer, tmp_path, share=0.6, **options):
    model = net()
    timed_plan = alds.analyze(model).plan(latency=share, example_inputs=images(), cache=tmp_path, **options)
    return model, timed_plan


def test_the_latency_is_met_measured_and_printed(timer, tmp_path):
    model, timed_plan = plan(timer, tmp_path)
    small = timed_plan.apply(model)
    achieved = timer.model(small) / timer.model(model)
    assert timed_plan.latency.measured == pytest.approx(achieved) and 0.54 <= achieved <= 0.66
    assert (timed_plan.latency.asked, timed_plan.budget, timed_plan.p) == (0.6, "latency=0.6", 4.0)
    assert timed_plan.gap < 0.02
    assert timed_plan.latency.dense_ms == pytest.approx(timer.model(model))
    assert str(timed_plan).splitlines()[-1].startswith(f"latency 0.60 asked, {achieved:.2f} measured, 2.")
    assert small(images()).shape == model(images()).shape


def test_the_cost_table_holds_the_times(timer, tmp_path):
    """With a timer that is linear in the rank, interpolation is exact from the smallest rank timed on."""
    model = net()
    analysis, timings = alds.analyze(model, groups=(1, 2)), Timings(CPU, tmp_path)
    layers = [layer for layer in analysis.layers if layer.name in analysis.spectra]
    basis = Basis("frobenius")
    errors = [layer_errors(analysis.spectra[layer.name], basis, None) for layer in layers]
    choices = [candidates(layer.shape, e, 1, 0.0) for layer, e in zip(layers, errors, strict=True)]
    calls = layer_inputs(model, images(), [layer.name for layer in layers])
    table = LayerTimes(model, images(), layers, choices, calls, timings, CPU).table(0.5)
    assert table.fixed == pytest.approx(timer.fixed * 1e6, abs=10) and table.limit == int(0.5 * table.total)
    for layer, choice, costs in zip(layers, choices, table.costs, strict=True):
        assert costs.dtype == np.int64 and costs[-1] == pytest.approx(timer.layer(layer.module) * 1e6, abs=2)
        for curve, start in zip(choice.curves, choice.starts, strict=False):
            stated = costs[start : start + len(curve.costs)]
            assert (np.diff(stated) >= 0).all()
            true = (0.01 + 1e-4 * (curve.costs - index_count(layer.shape, curve.pivots))) * 1e6
            known = timings.of(call_key(layer, next(iter(calls[layer.name]))))
            timed = np.isin(curve.ranks, list(known[curve.scheme, curve.groups, curve.pivots]))
            assert timed.any() and np.allclose(stated[timed], true[timed], atol=3)
            inside = curve.ranks <= curve.ranks[timed].max()  # times with pivots are concave in the rank
            assert curve.pivots or (stated[inside] >= true[inside] - 3).all()


def test_layers_of_one_kind_are_timed_once_and_few_slices_only(timer, tmp_path):
    _, timed_plan = plan(timer, tmp_path)
    assert str(timed_plan).endswith(
        f"on {timed_plan.latency.device}; quartiles of its rounds 0% apart; up to 8 channel slices were tried"
    )
    twins = [t for t in timer.timed if t[0].weight == (32, 32, 3, 3)]
    assert len(twins) == len(set(twins)) and {t[2] for t in timer.timed} == {1, 2, 3, 4, 8}


def test_what_is_slower_than_dense_is_timed_no_further(tmp_path, monkeypatch):
    class Slow(Timer):
        def layer(self, module):
            low_rank, linear = isinstance(module, LowRankLayer), isinstance(module, alds.LowRankLinear)
            return super().layer(module) * (1000 if linear else 5 if low_rank and module.slices > 1 else 1)

    timer = Slow()
    use(monkeypatch, timer)
    _, timed_plan = plan(timer, tmp_path, 0.7)
    assert all(row.groups in (None, 1) for row in timed_plan.layers)
    ranks = {}
    for shape, scheme, groups, rank, _ in timer.timed:
        ranks.setdefault((shape, scheme, groups), []).append(rank)
    assert timed_plan.layers[-1].reason == "no factorisation saves latency"
    assert max(len(r) for (*_, g), r in ranks.items() if g == 4) < max(len(r) for (*_, g), r in ranks.items() if g == 1)


def test_known_timings_are_not_measured_again(timer, tmp_path):
    _, first = plan(timer, tmp_path)
    assert timer.timed and len(list(tmp_path.iterdir())) == 1
    timer.timed.clear()
    _, second = plan(timer, tmp_path)
    assert timer.timed == [] and second == first
    plan(timer, tmp_path / "other")
    assert timer.timed
    before = set(tmp_path.parent.rglob("timings*"))
    model = net()
    alds.analyze(model).plan(latency=0.6, example_inputs=images(), cache=False)
    assert set(tmp_path.parent.rglob("timings*")) == before


def test_the_default_folder_is_the_environments(timer, tmp_path, monkeypatch):
    monkeypatch.setenv("ALDS_FAST_CACHE", str(tmp_path / "mine"))
    alds.compress(net(), latency=0.7, example_inputs=images())
    assert len(list((tmp_path / "mine").glob("timings-*.json"))) == 1
    monkeypatch.delenv("ALDS_FAST_CACHE")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert Timings(CPU).path.parent == tmp_path / ".cache" / "alds_fast"


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: text[: len(text) // 2],
        slow(lambda text: "[" * 100_000),
        slow(lambda text: "3"),
        lambda text: json.dumps({**json.loads(text), "environment": {}}),
        slow(lambda text: json.dumps({**json.loads(text), "calls": {"x": [[0, 1, "", 4, -1.0, 0.0]]}})),
        lambda text: json.dumps({**json.loads(text), "calls": {"x": [[0, 1, "", 4, 0.5, float("nan")]]}}),
        slow(lambda text: json.dumps({**json.loads(text), "calls": [3]})),
    ],
)
def test_a_corrupt_cache_is_reported_and_rebuilt(timer, tmp_path, damage):
    _, first = plan(timer, tmp_path)
    (file,) = tmp_path.iterdir()
    whole = file.read_text()
    file.write_text(damage(whole))
    timer.timed.clear()
    with pytest.warns(UserWarning, match="not a valid file of timings"):
        _, second = plan(timer, tmp_path)
    assert timer.timed and second == first and json.loads(file.read_text()) == json.loads(whole)


def test_a_folder_that_cannot_be_written_is_reported(timer, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.warns(UserWarning, match="timings could not be kept in .*cache= names another folder"):
        _, timed_plan = plan(timer, tmp_path / "file")
    assert timed_plan.latency.distance < 0.1


def test_timings_of_other_settings_are_not_used(tmp_path, monkeypatch):
    paths = [Timings(CPU, tmp_path).path]
    monkeypatch.setattr(torch, "get_num_threads", lambda: 77)
    paths.append(Timings(CPU, tmp_path).path)
    monkeypatch.setattr(torch, "__version__", "9.9")
    paths.append(Timings(CPU, tmp_path).path)
    assert len(set(paths)) == 3 and {p.parent for p in paths} == {tmp_path}


def test_two_processes_keep_each_others_timings(tmp_path):
    one, two = Timings(CPU, tmp_path), Timings(CPU, tmp_path)
    one.of("a")[0, 1, ""] = {4: Timed(0.5, 0.0)}
    two.of("a")[0, 1, ""] = {8: Timed(0.7, 0.1)}
    one.save()
    two.save()
    assert Timings(CPU, tmp_path).of("a") == {(0, 1, ""): {4: (0.5, 0.0), 8: (0.7, 0.1)}}


class Busy(Timer):
    """Every third round of low-rank layers takes twice as long as it should; ``calm`` puts an end to it."""

    calm = False

    def parts(self, run, modules, *, rounds, repeats, steady):
        model, inputs = run.args
        calls = layer_inputs(model, inputs, modules)
        ms = {(name, spec): n * self.layer(modules[name]) for name, specs in calls.items() for spec, n in specs.items()}
        return self.model(model), ms

    def __call__(self, calls, device, *, rounds=7, min_ms=2.0):
        times = super().__call__(calls, device, rounds=rounds, min_ms=min_ms)
        for name, call in calls.items():
            if isinstance(call.func, LowRankLayer) and not self.calm:
                times[name] = [t * (2 if i % 3 == 0 else 1) for i, t in enumerate(times[name])]
        return times


def test_timings_of_a_busy_hour_are_repeated_and_not_kept(tmp_path, monkeypatch):
    timer = Busy()
    use(monkeypatch, timer)
    with pytest.warns(UserWarning, match=r"timings of layers have rounds that are more than 20% apart after 15 of"):
        plan(timer, tmp_path)
    shapes = [t[0] for t in timer.timed]
    assert len(shapes) > 2 * len(set(timer.timed))
    rows = [row for call in json.loads(next(tmp_path.iterdir()).read_text())["calls"].values() for row in call]
    assert rows and all(row[-1] > 0.2 for row in rows)
    timer.calm = True
    timer.timed.clear()
    _, calm = plan(timer, tmp_path)
    assert timer.timed
    assert calm == plan(timer, tmp_path / "never busy")[1]


class BusyRuns(Timer):
    """Rounds of the compressed model take by turns as long as they should and twice as long as the dense one."""

    runs = 0

    def __call__(self, calls, device, *, rounds=7, min_ms=2.0):
        times = super().__call__(calls, device, rounds=rounds, min_ms=min_ms)
        if "compressed" in calls:
            self.runs += 1
            times["dense"] = [t * (1 + i / 10) for i, t in enumerate(times["dense"])]
            late = [2 * d if i % 2 == 0 else d / 2 for i, d in enumerate(times["dense"])]
            times["compressed"] = late
        return times


def test_runs_that_are_far_apart_are_repeated_and_refuse_nothing(tmp_path, monkeypatch):
    timer = BusyRuns()
    use(monkeypatch, timer)
    with pytest.warns(UserWarning, match=r"quartiles of its rounds 75% apart.*The machine is busy"):
        model, timed_plan = plan(timer, tmp_path)
    achieved = timed_plan.latency
    assert timer.runs % 3 == 0 and timer.runs and not achieved.steady and achieved.spread == pytest.approx(0.75)
    assert achieved.measured == pytest.approx(achieved.compressed_ms / achieved.dense_ms) == 2.0
    assert alds.Plan.from_json(timed_plan.to_json()).latency == achieved and timed_plan.apply(model)


def test_plans_of_before_have_no_spread(timer, tmp_path):
    text = json.loads(plan(timer, tmp_path)[1].to_json())
    del text["latency"]["spread"]
    old = alds.Plan.from_json(json.dumps(text)).latency
    assert old.spread is None and old.steady and "quartiles" not in str(old)
    text["latency"]["spread"] = -0.5
    with pytest.raises(PlanError, match=r"latency: spread=-0\.5 is not a number >= 0"):
        alds.Plan.from_json(json.dumps(text))


# ----------------------------------------------------------------------------------------- refinement


def _slower(monkeypatch, factor):
    timer = Timer(factor)
    use(monkeypatch, timer)
    return timer


@pytest.mark.parametrize("factor", [1.5, 0.6])
def test_layers_that_run_otherwise_in_the_model_are_corrected(monkeypatch, tmp_path, factor):
    timer = _slower(monkeypatch, factor)
    model, timed_plan = plan(timer, tmp_path, 0.5)
    assert timer.model(timed_plan.apply(model)) / timer.model(model) == pytest.approx(timed_plan.latency.measured)
    assert timed_plan.latency.distance <= 0.1 and 1 <= timed_plan.latency.refinements <= 4
    assert "NOT" not in str(timed_plan)


def test_latencies_that_change_faster_than_predicted_are_closed_in_on(monkeypatch, tmp_path):
    """Corrected by the ratio of the last plan alone, limits swing from far below to far above what is asked for."""

    class Steep(Timer):
        def model(self, model):
            dense = sum(self.layer(m) for m in net().modules()) + self.fixed
            return dense * (1 + 2.2 * (super().model(model) / dense - 1))

    use(monkeypatch, Steep())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        _, timed_plan = plan(None, tmp_path, 0.6)
    assert timed_plan.latency.distance <= 0.1 and 2 <= timed_plan.latency.refinements <= 4


def test_what_cannot_be_reached_is_said(monkeypatch, tmp_path):
    timer = _slower(monkeypatch, 8.0)
    with pytest.warns(UserWarning, match="was not brought within 10% of the latency asked for: latency 0.40 asked"):
        _, timed_plan = plan(timer, tmp_path, 0.4)
    assert timed_plan.latency.measured > 0.44 and "measured, NOT within 10% of it" in str(timed_plan)


def test_a_smallest_reachable_latency_is_named(timer, tmp_path):
    with pytest.raises(BudgetError, match=r"latency=0\.05 cannot be met: the smallest reachable is latency=0") as e:
        plan(timer, tmp_path, 0.05)
    share = float(str(e.value).split("reachable is latency=")[1].split(",")[0])
    assert "measured: 2.33 -> 0.31" in str(e.value)
    assert plan(timer, tmp_path, share / 1.05)[1].latency.distance < 0.1  # within the tolerance it is tried
    with pytest.raises(BudgetError):
        plan(timer, tmp_path, share / 1.2)
    _, timed_plan = plan(timer, tmp_path, share)
    assert timed_plan.latency.distance < 0.1


def test_a_latency_below_the_smallest_prediction_is_tried(monkeypatch, tmp_path):
    """Layers are timed with warm caches; in the model the dense ones may be slower, and more be reached."""
    timer = _slower(monkeypatch, 0.1)
    _, timed_plan = plan(timer, tmp_path, 0.12)  # 0.135 is the smallest prediction
    assert timed_plan.latency.distance <= 0.1


def test_a_latency_is_not_refused_while_a_faster_plan_was_measured(monkeypatch, tmp_path):
    """Nothing between a fast plan and slow ones: a warning, and the nearest."""

    class Jump(Timer):
        def model(self, model):
            dense = sum(self.layer(m) for m in net().modules()) + self.fixed
            return dense * (0.05 if super().model(model) < 0.2 * dense else 0.5)

    use(monkeypatch, Jump())
    with pytest.warns(UserWarning, match="was not brought within 10% of the latency asked for: latency 0.12 asked"):
        _, timed_plan = plan(None, tmp_path, 0.12)
    assert timed_plan.latency.measured == pytest.approx(0.1)


@pytest.mark.parametrize("asked", [0.95, 0.8])
def test_a_model_that_is_hardly_any_faster_however_small_gets_no_plan(monkeypatch, tmp_path, asked):
    """Its small layers take the time of large ones: errors for nothing, or the dense model, would be no answer."""

    class Slow(Timer):
        def model(self, model):
            dense = sum(self.layer(m) for m in net().modules()) + self.fixed
            return dense if count(model) == count(net()) else 0.98 * dense

    use(monkeypatch, Slow())
    with pytest.raises(BudgetError, match=rf"latency={asked} cannot be met: .* nearest takes (0.98|1.00) of the dense"):
        plan(None, tmp_path, asked)


def test_limits_are_corrected_between_what_was_measured():
    table = CostTable("latency", 0.5, (np.array([100, 30, 60, 80]),), 0, 100, 50, "ms")
    for shares, expected in (
        ({1: 0.4}, 37.5),  # by the ratio
        ({1: 0.4, 3: 0.8}, 42.5),  # on the line
        ({1: 0.4, 3: 0.8, 2: 0.7}, 45),  # half-way, as two were above
        ({3: 0.4, 1: 0.8}, 18.75),  # costs the other way round
    ):
        assert corrected_limit(table, [([pick], share) for pick, share in shares.items()]) == pytest.approx(expected)


def test_progress_tells_of_the_timings(timer, tmp_path):
    told = []
    plan(timer, tmp_path, 0.6, progress=lambda *of: told.append(of))
    done = [done for what, done, _ in told if what == "timings of layers"]
    assert done == list(range(1, told[-1][2] + 1)) != []


def test_parameters_and_latency_hold_at_once(timer, tmp_path):
    for params, share in ((0.5, 0.6), (0.3, 0.9), (0.9, 0.5)):
        model, timed_plan = plan(timer, tmp_path, share, params=params)
        small = timed_plan.apply(model)
        assert count(small) <= params * count(model) and timed_plan.budget == f"params={params}, latency={share}"
        assert timer.model(small) / timer.model(model) <= 1.1 * share and timed_plan.gap < 0.2
    _, timed_plan = plan(timer, tmp_path, 0.7, flops=0.5)
    assert timed_plan.budget == "flops=0.5, latency=0.7"


def test_the_exact_solver_takes_the_times_as_they_are(timer, tmp_path):
    """Under a timer that counts weights, parameters and latency ask for the same: no plan may be worse."""
    _, timed_plan = plan(timer, tmp_path, 0.6)
    _, other = plan(timer, tmp_path, 0.6, p=4)
    assert other.gap >= 0 and other.error >= timed_plan.error


def test_a_model_that_cannot_be_copied_or_run(timer, tmp_path):
    class Stubborn(nn.Linear):
        def __deepcopy__(self, memo):
            raise RuntimeError("no copies of me")

    model = nn.Sequential(nn.Linear(64, 64), Stubborn(64, 64))
    with pytest.raises(ModelError, match="cannot be deep-copied"):
        alds.analyze(model).plan(latency=0.9, example_inputs=torch.randn(1, 64), cache=tmp_path)


@pytest.mark.slow
def test_a_model_of_few_parts_runs_with_the_real_timer(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # whether a real machine gets within 10 % decides no test
        achieved = alds.analyze(small_net(), groups=(1, 2)).plan(
            latency=1.0, example_inputs=images(), cache=tmp_path
        ).latency  # fmt: skip
    assert achieved.asked == 1.0 and achieved.measured > 0 and achieved.compressed_ms > 0


# ------------------------------------------------------------------------------------------------- parts


@given(st.dictionaries(st.integers(1, 60), st.floats(0.01, 5.0), min_size=1), st.integers(1, 80))
def test_ratios_never_fall_with_the_rank(known, top):
    ranks = np.arange(1, top + 1)
    ratios = interpolate(known, ranks)
    assert (np.diff(ratios) >= -1e-12).all() and (ratios > 0).all()
    for rank, ratio in known.items():
        assert rank > top or ratios[rank - 1] >= ratio * (1 - 1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_random_layers_have_the_weights_norm_and_leave_torchs_generator_alone(dtype):
    module = nn.Conv2d(64, 48, 3, padding=1).to(dtype)
    state = torch.get_rng_state()
    layer = random_low_rank(module, Decomposition(1, 2, 12))
    assert torch.equal(state, torch.get_rng_state())
    assert {p.dtype for p in layer.parameters()} == {dtype} and layer.padding == (1, 1)
    assert float((layer.dense_weight().norm() / module.weight.norm()).detach()) == pytest.approx(1.0, rel=0.2)


def test_the_description_of_a_call_tells_what_matters():
    layer = alds.analyze(nn.Conv2d(4, 4, 3)).layers[0]
    spec = InputSpec((1, 4, 8, 8), torch.float32, "cpu", False)
    other = InputSpec((1, 4, 8, 8), torch.float32, "cpu", True)
    strided = alds.analyze(nn.Conv2d(4, 4, 3, stride=2)).layers[0]
    assert len({call_key(layer, spec), call_key(layer, other), call_key(strided, spec)}) == 3


def test_plans_with_a_latency_survive_json_and_old_ones_load(timer, tmp_path):
    _, timed_plan = plan(timer, tmp_path)
    assert alds.Plan.from_json(timed_plan.to_json()) == timed_plan
    data = json.loads(timed_plan.to_json())
    row = next(r for r in data["layers"] if r["rank"])
    edited = json.loads(timed_plan.to_json())
    next(r for r in edited["layers"] if r["rank"])["rank"] = row["rank"] + 1
    assert alds.Plan.from_json(json.dumps(edited)).latency is None  # it was of another plan
    old = {k: v for k, v in data.items() if k != "latency"}
    assert data["version"] == 1 and alds.Plan.from_json(json.dumps(old)).latency is None
    for bad in ({"asked": 0.5}, 3, {**data["latency"], "measured": 0.0}, {**data["latency"], "device": 3}):
        with pytest.raises(PlanError, match="latency"):
            alds.Plan.from_json(json.dumps({**data, "latency": bad}))


def test_a_plan_with_a_latency_is_saved_with_the_model(timer, tmp_path):
    model, timed_plan = plan(timer, tmp_path)
    alds.save(timed_plan.apply(model), tmp_path / "small.safetensors")
    assert alds.load(tmp_path / "small.safetensors", model).alds_plan == timed_plan
