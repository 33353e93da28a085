"""Evaluations: what is run, what is kept, what is refused."""

import math
import os
import signal
import subprocess
import sys
import time
from functools import partial
from multiprocessing.connection import wait
from pathlib import Path

import pytest
import torch
from support.models import count
from torch import nn

import alds_fast as alds
from alds_fast.errors import (
    ArgumentError,
    BudgetError,
    EvaluationError,
    FileFormatError,
    FileWriteError,
    MissingFileError,
    ModelError,
)
from alds_fast.evaluation import cells, run_cell, workers
from alds_fast.evaluation import variants as variant_module
from alds_fast.evaluation.log import Records
from alds_fast.evaluation.table import COLUMNS

PARAMS = 32 * 32 + 32 * 8  # of net
NUMBERS = [c for c in COLUMNS if not c.startswith("seconds")]


def net(seed=0):
    generator = torch.Generator().manual_seed(seed)
    model = nn.Sequential(nn.Linear(32, 32, bias=False), nn.ReLU(), nn.Linear(32, 8, bias=False))
    for p in model.parameters():
        p.data = torch.randn(p.shape, generator=generator)
    return model


def kept(model):
    """A quality that is known beforehand: the share of the parameters of the dense network."""
    return count(model) / PARAMS


def first(model, share, seed):
    """Filter pruning: the first half of the hidden units, whatever the share."""
    small = nn.Sequential(nn.Linear(32, 16, bias=False), nn.ReLU(), nn.Linear(16, 8, bias=False))
    small[0].weight.data, small[2].weight.data = model[0].weight.data[:16], model[2].weight.data[:, :16]
    return small


def widened(model, seed):
    """'Retraining' that adds 128 parameters."""
    return nn.Sequential(model, nn.Linear(128, 1, bias=False))


def killing(model):
    os.kill(os.getpid(), signal.SIGKILL)


VARIANTS = {"alds": {}, "heuristic": {"method": "alds-heuristic"}, "prune": first}


def _rows(table):
    return [{name: row[name] for name in NUMBERS} for row in table.rows]


class Counted:
    """The quality ``kept``, counting its calls, raising ``error`` at one of them."""

    name = "kept"

    def __init__(self, fail_at=None, error=KeyboardInterrupt):
        self.calls, self.fail_at, self.error = 0, fail_at, error

    def __call__(self, model):
        self.calls += 1
        if self.calls == self.fail_at:
            raise self.error("stop")
        return kept(model)


def test_rows_say_what_was_asked_and_what_came_out():
    model = net()
    table = alds.evaluate(model, kept, budgets=[0.3, 0.5], variants=VARIANTS, example_inputs=torch.randn(2, 32))
    assert [(r["variant"], r["share"]) for r in table.rows] == [(v, s) for v in VARIANTS for s in (0.5, 0.3)]
    for row in table.rows[:4]:
        plan = alds.analyze(model).plan(params=row["share"], method=row["method"])
        assert row["quality"] == row["params"] == plan.keep_ratio <= row["share"]
        indices = sum(r.shape[r.pivots == "input"] for r in plan.layers if r.pivots)
        assert row["flops"] == row["params"] - indices / PARAMS  # 2 operations per parameter and row, none per index
        norm = 4.0 if row["method"] == "alds" else math.inf
        assert row["error"] == plan.error and (row["criterion"], row["p"]) == ("frobenius", norm)
        assert row["drop"] == 1.0 - row["quality"] and row["quality_dense"] == 1.0
    pruned = table.rows[4]
    assert pruned["params"] == pruned["quality"] == (16 * 32 + 16 * 8) / PARAMS == 0.5
    assert (pruned["method"], pruned["error"], pruned["seconds_plan"]) == (None, None, None)
    for row in table.rows:
        assert row["status"] == "done" and row["seconds_quality"] > 0 and row["seconds_apply"] > 0
        assert (row["torch"], row["alds_fast"]) == (torch.__version__, alds.__version__)


def test_budgets_on_operations():
    table = alds.evaluate(net(), kept, budgets=[0.4], budget="flops", example_inputs=torch.randn(3, 32))
    assert table.budget == "flops" and 0.3 < table.rows[0]["flops"] <= 0.4


def test_one_analysis_serves_all_cells_with_its_options(monkeypatch):
    made = []
    monkeypatch.setattr(run_cell, "analyze", lambda model, **o: made.append(o["groups"]) or alds.analyze(model, **o))
    variants = {"alds": {}, "operator": {"criterion": "operator"}, "one": {"groups": (1,)}}
    alds.evaluate(net, kept, variants=variants, seeds=[3, 4])
    assert made == ["divisors", (1,)] * 2
    made.clear()
    alds.evaluate(net(), kept, variants=variants, seeds=[3, 4])  # the model does not depend on the seed
    assert made == ["divisors", (1,)]


def test_models_data_and_retraining_get_the_seed(monkeypatch):
    given = []

    def analyze(model, *, groups="divisors", data=None, progress=None):
        given.append((model[0].weight[0, 0].item(), data))
        return alds.analyze(model, groups=groups)

    monkeypatch.setattr(variant_module, "analyze", analyze)
    monkeypatch.setattr(run_cell, "analyze", analyze)
    variants = {"without": {}, "with": {"data": True}}
    weights = [net(seed)[0].weight[0, 0].item() for seed in (5, 6)]
    table = alds.evaluate(net, kept, variants=variants, budgets=[0.5], seeds=(5, 6), data=lambda s: [s], after=widened)
    assert given == [(weights[0], None), (weights[0], [5]), (weights[1], None), (weights[1], [6])]
    for row in table.rows:
        assert row["quality_after"] == row["quality"] + 128 / PARAMS
        assert row["drop_after"] == 1.0 - row["quality_after"] and row["seconds_after"] > 0
    with pytest.raises(ArgumentError, match=r"variants\['with'\] has data=True, refit=True or refine=: give data="):
        alds.evaluate(net, kept, variants=variants)


def test_blocks_are_refined_by_a_variants_passes():
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    model = nn.TransformerEncoder(layer, 3, enable_nested_tensor=False).eval()
    batches = [torch.randn(4, 6, 16) for _ in range(8)]

    def nearness(net):
        return -float(sum((net(x) - model(x)).square().sum() for x in batches))

    variants = {"plain": {}, "two": {"refine": 2}, "usual": {"refine": True}}
    table = alds.evaluate(model, nearness, variants=variants, budgets=[0.8], data=lambda seed: batches)
    plain, two, usual = (next(r["quality"] for r in table.rows if r["variant"] == name) for name in variants)
    small = alds.compress(model, params=0.8)
    assert plain < two and plain < usual and two != usual
    assert two == pytest.approx(nearness(alds.refine(small, model, batches, epochs=2)[0]), rel=1e-4)
    with pytest.raises(ArgumentError, match=r"variants\['odd'\]: refine=-1 is neither True nor False nor a number of"):
        alds.evaluate(model, nearness, variants={"odd": {"refine": -1}}, data=lambda seed: batches)


def test_cells_do_not_depend_on_each_other():
    """The random numbers of a cell, and of the caller, are the same whatever ran before; the model is not changed."""

    def noise(model, share, seed):
        model[0].weight.data.zero_()  # a copy
        return nn.Linear(1, 1).requires_grad_(False)

    def draw(model):
        return float(torch.rand(()))

    model, state = net(), torch.get_rng_state()
    before = model[0].weight.clone()
    both = alds.evaluate(model, draw, variants={"a": noise, "b": noise}, seeds=[0, 1], budgets=[0.5])
    alone = alds.evaluate(model, draw, variants={"b": noise}, seeds=[1], budgets=[0.5])
    assert both.rows[3]["quality"] == alone.rows[0]["quality"] != both.rows[2]["quality"]
    assert torch.equal(model[0].weight, before) and torch.equal(torch.get_rng_state(), state)


@pytest.mark.slow
def test_a_run_that_was_cut_off_goes_on(tmp_path):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    options = {"variants": VARIANTS, "seeds": [0, 1], "after": widened}
    quality = Counted()
    table = alds.evaluate(net, quality, out=whole, **options)
    assert quality.calls == 2 * (1 + 6 * 2)  # two dense models; six cells each, before and after
    stopped = Counted(fail_at=8)
    with pytest.raises(KeyboardInterrupt):
        alds.evaluate(net, stopped, out=parts, **options)
    assert len(alds.Evaluation.read(parts).rows) == 3  # calls 2 to 7
    with open(parts / "results.jsonl", "a") as file:
        file.write('{"variant": "al')  # killed while writing
    rest = Counted()
    resumed = alds.evaluate(net, rest, out=parts, **options)
    assert rest.calls == quality.calls - 7
    assert _rows(resumed) == _rows(table) == _rows(alds.Evaluation.read(parts)) == _rows(alds.Evaluation.read(whole))
    assert len({p.stat().st_mode for p in parts.iterdir()}) == 1
    assert {p.name for p in parts.iterdir()} == {p.name for p in whole.iterdir()}
    assert (parts / "table.md").read_text() == (whole / "table.md").read_text()
    done = Counted()
    text = (parts / "results.jsonl").read_bytes()
    assert _rows(alds.evaluate(net, done, out=parts, **options)) == _rows(table)
    assert done.calls == 0 and (parts / "results.jsonl").read_bytes() == text


@pytest.mark.slow
def test_a_killed_process_keeps_its_cells(tmp_path):
    code = (
        "import os, alds_fast as alds, test_evaluate as t\n"
        "q = t.Counted(fail_at=3, error=lambda _: t.killing(None))\n"
        f"alds.evaluate(t.net(), q, out={str(tmp_path / 'out')!r})"
    )
    places = Path(alds.__file__).parents[1], Path(__file__).parents[1], Path(__file__).parent
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, places))}
    killed = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, timeout=120)
    assert killed.returncode == -signal.SIGKILL
    rest = Counted()
    assert len(alds.evaluate(net(), rest, out=tmp_path / "out").rows) == 2 and rest.calls == 1


def test_more_variants_and_seeds_are_added_to_a_folder(tmp_path):
    alds.evaluate(net, kept, variants={"alds": {}}, out=tmp_path)
    quality = Counted()
    quality.name = variant_module.callable_name(kept)
    more = {"alds": {}, "prune": first}
    table = alds.evaluate(net, quality, variants=more, seeds=[0, 1], out=tmp_path)
    assert quality.calls == 2 + 1 + 4 and len(table.rows) == 8
    other = {"alds": {"groups": (1,)}}  # the same name with other options is another cell, the latest counts
    quality.calls = 0
    alds.evaluate(net, quality, variants=other, budgets=[0.5], out=tmp_path)
    assert quality.calls == 1 and len(alds.Evaluation.read(tmp_path).rows) == 8


@pytest.mark.parametrize("model", [net(1), lambda seed: net(seed + 1)])
def test_results_of_another_model_are_refused(tmp_path, model):
    alds.evaluate(net(), kept, out=tmp_path)
    text = (tmp_path / "results.jsonl").read_bytes()
    with pytest.raises(ArgumentError, match=r"model of seed 0 \(Sequential, 1,280 parameters, crc .*is not the one of"):
        alds.evaluate(model, kept, out=tmp_path, budgets=[0.2])
    assert (tmp_path / "results.jsonl").read_bytes() == text


def test_results_of_another_setting_are_refused(tmp_path):
    alds.evaluate(net(), kept, out=tmp_path)
    inputs = torch.randn(2, 32)
    with pytest.raises(ArgumentError, match="was evaluated with budget='params', not 'flops'"):
        alds.evaluate(net(), kept, out=tmp_path, budget="flops", example_inputs=inputs)
    with pytest.raises(
        ArgumentError, match=r"was evaluated with quality='test_evaluate.kept \w+', not 'test_evaluate.net \w+'"
    ):
        alds.evaluate(net(), net, out=tmp_path)
    with pytest.raises(ArgumentError, match="was evaluated with after=None"):
        alds.evaluate(net(), kept, out=tmp_path, after=widened)
    (tmp_path / "results.jsonl").write_text('{"format": "alds_fast.evaluation", "version": 9}\n')
    with pytest.raises(FileFormatError, match="version 9"):
        alds.evaluate(net(), kept, out=tmp_path)
    for content in (b"\xff\xfe\n", b"[]\n", b'{"seed": 0}\n', b"not json\n"):
        (tmp_path / "results.jsonl").write_bytes(content)
        with pytest.raises(FileFormatError):
            alds.Evaluation.read(tmp_path)
    with pytest.raises(MissingFileError, match=r"holds no results.jsonl"):
        alds.Evaluation.read(tmp_path / "none")


def test_functions_are_told_apart_by_what_they_do(tmp_path):
    def scaled(model, factor):
        return factor * kept(model)

    names = {
        variant_module.callable_name(f)
        for f in (partial(scaled, factor=1), partial(scaled, factor=7), partial(kept), lambda m: 1.0, lambda m: 2.0)
    }
    assert len(names) == 5 and variant_module.callable_name(partial(scaled, factor=7)) in names
    alds.evaluate(net(), partial(scaled, factor=1), out=tmp_path)
    with pytest.raises(ArgumentError, match="was evaluated with quality=.partial"):
        alds.evaluate(net(), partial(scaled, factor=7), out=tmp_path)


def test_combinations_are_given_the_data():
    options = {"budgets": [0.5], "data": lambda seed: [torch.randn(64, 32)]}
    table = alds.evaluate(net(), kept, criteria=["output", "sensitivity"], **options)
    assert [row["criterion"] for row in table.rows] == ["output", "sensitivity"]
    assert alds.evaluate(net(), kept, methods=["pca"], **options).rows[0]["status"] == "done"


def test_a_model_that_changes_from_call_to_call_is_noticed(tmp_path):
    records = Records(None)
    records.check(0, "one")
    records.check(1, "two")
    with pytest.raises(ArgumentError, match=r"seed 0 \(two, before: one\) was built twice with different weights"):
        records.check(0, "two")
    numbers = iter(range(10))
    alds.evaluate(lambda seed: net(next(numbers)), kept, seeds=[0, 1], out=tmp_path)  # each is built once
    with pytest.raises(ArgumentError, match="or load the same weights"):
        alds.evaluate(lambda seed: net(next(numbers)), kept, seeds=[0, 1], out=tmp_path)


def test_failed_cells_are_recorded_and_raised(tmp_path):
    def broken(model, share, seed):
        if share < 0.4:
            raise ValueError("no such luck")
        return model

    def nothing(model, share, seed):
        return None

    variants = {"alds": {"groups": (1,)}, "broken": broken, "nothing": nothing, "nan": {"p": 2}}

    def quality(model):
        return math.nan if getattr(getattr(model, "alds_plan", None), "p", None) == 2 else kept(model)

    with pytest.raises(EvaluationError, match=r"4 cells failed, the first is 'broken', share 0.01, seed 0: Value") as e:
        alds.evaluate(net(), quality, budgets=[0.5, 0.01], variants=variants, out=tmp_path)
    assert isinstance(e.value.__cause__, ValueError)
    status = {(r["variant"], r["share"]): (r["status"], r["message"][:25]) for r in e.value.evaluation.rows}
    assert status["alds", 0.5] == status["broken", 0.5] == ("done", "")
    assert status["alds", 0.01][0] == "cannot be met" and "params=0.01" in status["alds", 0.01][1]
    assert status["broken", 0.01] == ("failed", "ValueError: no such luck")
    assert status["nothing", 0.5] == ("failed", "'nothing' returned a None")
    assert status["nan", 0.5] == ("failed", "quality returned nan; ret")
    assert _rows(alds.Evaluation.read(tmp_path)) == _rows(e.value.evaluation)
    text = (tmp_path / "table.md").read_text()
    assert "1 cannot be met |" in text and "1 failed |" in text
    name = variant_module.callable_name(quality)
    quality = Counted()
    quality.name = name
    with pytest.raises(EvaluationError):  # what failed is tried again, what cannot be met is not
        alds.evaluate(net(), quality, budgets=[0.5, 0.01], variants=variants, out=tmp_path)
    assert quality.calls == 1


def test_a_dense_model_without_quality_ends_it():
    quality = Counted(fail_at=1, error=ValueError)
    with pytest.raises(EvaluationError, match="1 cell failed, the first is 'dense', share 1, seed 0: ValueError: stop"):
        alds.evaluate(net(), quality)
    assert quality.calls == 1


def _fails(model, share, seed):
    raise OSError("out of luck")


@pytest.mark.slow
def test_workers_give_the_same_rows(tmp_path):
    options = {"variants": {**VARIANTS, "fails": _fails}, "seeds": [0, 1], "after": widened}
    options["example_inputs"] = torch.randn(2, 32)
    with pytest.raises(EvaluationError, match="4 cells failed") as one:
        alds.evaluate(net, kept, **options)
    with pytest.raises(EvaluationError, match="4 cells failed.*'fails', .* OSError: out of luck") as two:
        alds.evaluate(net, kept, workers=2, out=tmp_path, **options)
    rows = _rows(one.value.evaluation)
    assert rows == _rows(two.value.evaluation) == _rows(alds.Evaluation.read(tmp_path)) and len(rows) == 16


@pytest.mark.slow
def test_workers_that_end_and_what_cannot_be_sent_to_them():
    model = net()
    with pytest.raises(EvaluationError, match="a worker process ended"):
        alds.evaluate(model, killing, workers=2, budgets=[0.5])
    assert not model[0].weight.is_shared()
    with pytest.raises(ArgumentError, match=r"workers=2 needs a model and functions that can be pickled"):
        alds.evaluate(model, lambda m: 0.0, workers=2)


@pytest.mark.slow
def test_closing_the_pool_ends_its_processes():
    task = cells.Task(net(), _sleeping, {})
    outcomes = workers.parallel(task, [(cells.Cell(variant_module.DENSE, 1.0, s), s == 0) for s in range(3)], 2)
    assert next(outcomes)[0].seed == 0
    begin = time.perf_counter()
    outcomes.close()
    for process in workers.multiprocessing.active_children():
        assert wait([process.sentinel], 60)  # not join: the pool's own thread may be the one to reap it
    assert time.perf_counter() - begin < 300  # not the hour that the others would sleep


def _sleeping(model):
    time.sleep(3600)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"budgets": []}, BudgetError, "expected a list of shares"),
        ({"budgets": [0.5, 1.5]}, BudgetError, r"1.5 is outside \(0, 1\]"),
        ({"budgets": [0.5, 0.5]}, ArgumentError, "the same value twice"),
        ({"budget": "latency"}, ArgumentError, "budget='latency' is not one of params, flops"),
        ({"budget": "flops"}, ArgumentError, "needs example_inputs="),
        ({"seeds": []}, ArgumentError, "seeds="),
        ({"seeds": [0.5]}, ArgumentError, "seeds="),
        ({"workers": 0}, ArgumentError, "workers=0"),
        ({"variants": {}}, ArgumentError, "with an entry"),
        ({"variants": {"dense": {}}}, ArgumentError, "the name 'dense'"),
        ({"variants": {"a": 5}}, ArgumentError, "neither a dict of options nor a function"),
        ({"variants": {"a": {"rank": 5}}}, ArgumentError, "unknown option 'rank'; known are align"),
        ({"variants": {"a": {"p": 0}}}, ArgumentError, "p=0 is outside"),
        ({"variants": {"a": {}}, "methods": ["alds-heuristic"]}, ArgumentError, "not both"),
        ({"methods": ["magic"]}, ArgumentError, "method='magic' is not one of"),
        ({"criteria": "frobenius"}, ArgumentError, "expected a non-empty list"),
        ({"criteria": ["best"]}, ArgumentError, "criterion='best'"),
        ({"out": "no/such/folder"}, MissingFileError, "its parent folder does not exist"),
        ({"out": __file__}, ArgumentError, "is not a folder"),
        ({"after": 3}, ArgumentError, "after is a int"),
    ],
)
def test_refusals_before_any_work(options, error, message):
    with pytest.raises(error, match=message):
        alds.evaluate(lambda seed: pytest.fail("the model was built"), kept, **options)


def test_refused_models():
    with pytest.raises(ModelError, match=r"model= is called with a seed .*: def build\(seed\)"):
        alds.evaluate(lambda: nn.Linear(8, 8), lambda model: 1.0)
    with pytest.raises(ModelError, match="model is a int"):
        alds.evaluate(3, kept)
    with pytest.raises(ModelError, match="model returned a str"):
        alds.evaluate(lambda seed: "net", kept)
    with pytest.raises(ModelError, match="did not run through the model"):
        alds.evaluate(net(), kept, example_inputs=torch.randn(2, 5))


def test_combinations_that_do_not_go_together_are_named():
    with pytest.warns(UserWarning, match=r"left out of the evaluation: alds-heuristic p=2 \(p=2 applies to"):
        combinations = variant_module.product(["alds", "alds-heuristic"], ["operator"], [2, math.inf], groups=(1,))
    assert list(combinations) == ["alds p=2", "alds p=inf", "alds-heuristic p=inf"]
    assert combinations["alds p=2"] == {"method": "alds", "criterion": "operator", "p": 2, "groups": (1,)}


def test_pictures_of_a_run(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    alds.evaluate(net(), kept, budgets=[0.5, 0.2, 0.05], out=tmp_path / "a", example_inputs=torch.randn(1, 32))
    assert {p.name for p in (tmp_path / "a").glob("*.png")} == {"quality_params.png", "quality_flops.png"}
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.warns(UserWarning, match="no pictures: matplotlib is not installed"):
        alds.evaluate(net(), kept, budgets=[0.5], out=tmp_path / "b")
    assert (tmp_path / "b/table.md").is_file() and not list((tmp_path / "b").glob("*.png"))


def test_progress_bar(capsys):
    alds.evaluate(net(), kept, progress=True)
    assert "3/3" in capsys.readouterr().err
    alds.evaluate(net(), kept)  # not a terminal
    assert capsys.readouterr().err == ""


def test_a_log_that_cannot_be_written_is_said(tmp_path, monkeypatch):
    def refuse(file):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("alds_fast.evaluation.log.os.fsync", refuse)
    with pytest.raises(FileWriteError, match=r"results.jsonl.*No space left.*free some space"):
        alds.evaluate(net(), kept, budgets=[0.4], out=tmp_path)
