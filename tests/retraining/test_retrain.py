"""Retraining: rewound learning rates, budgets of every cycle, distillation, refusals."""

import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from support.marks import slow
from support.models import count
from support.training import Stop, adam, cosine, equal, fewer_filters, net, run, sgd, step, warm
from torch import nn
from torch.optim import lr_scheduler
from torch.utils.data import DataLoader

import alds_fast as alds
from alds_fast.errors import (
    ArgumentError,
    BudgetError,
    MissingFileError,
    ModelError,
    TrainingError,
)
from alds_fast.layers import LowRankLayer
from alds_fast.retraining.loop import soft_target_loss


@pytest.mark.parametrize("schedule", [step, slow(cosine), warm, slow(None)])
def test_learning_rates_are_the_tail_of_the_original_schedule(data, schedule):
    model = net()
    optimizer = sgd(model)
    scheduler = schedule(optimizer) if schedule else None
    original, used = [], []
    for _ in range(7):
        original.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        if scheduler:
            scheduler.step()

    class Recording(torch.optim.SGD):
        def step(self, closure=None):
            used.append(self.param_groups[0]["lr"])
            return super().step(closure)

    def factory(m):
        return Recording(m.parameters(), lr=0.05)

    result = run(model, data, epochs=7, epochs_retrain=4, scheduler=schedule, optimizer=factory, cycles=2)
    assert used == [rate for rate in original[3:] for _ in range(3)] * 2
    assert [r["learning_rates"] for r in result.history] == [[rate] for rate in original[3:]] * 2
    assert [(r["cycle"], r["epoch"], r["rewound_epoch"]) for r in result.history] == [
        (cycle, epoch, 3 + epoch) for cycle in range(2) for epoch in range(4)
    ]


def test_rewinding_warns_of_nothing(data, recwarn):
    run(net(), data, epochs=5, epochs_retrain=2, scheduler=step)
    assert not [w for w in recwarn if "lr_scheduler" in str(w.message)]


def test_one_shot_is_compress_and_a_plain_loop(data):
    """Bit for bit what one writes by hand."""
    model = net()
    result = run(model, data, scheduler=step, epochs=4, epochs_retrain=3)
    torch.manual_seed(5)
    small = alds.compress(model, params=0.4).train()
    loader, optimizer = DataLoader(data, 16, shuffle=True), sgd(small)
    for epoch in range(1, 4):
        optimizer.param_groups[0]["lr"] = 0.05 if epoch < 2 else 0.05 * 0.1
        for x, y in loader:
            optimizer.zero_grad()
            nn.functional.cross_entropy(small(x), y).backward()
            optimizer.step()
    assert equal(result.model, small) and result.plans == (small.alds_plan,)


@pytest.mark.parametrize(
    ("options", "shares"),
    [
        ({"keep": 0.3}, [0.3]),
        ({"keep": 0.25, "cycles": 2}, [0.5, 0.25]),
        ({"keep": 0.125, "cycles": 3}, [0.5, 0.25, 0.125]),
        ({"keep": (0.6, 0.35, 0.35)}, [0.6, 0.35, 0.35]),
    ],
)
def test_every_cycle_keeps_its_share_of_the_original(data, options, shares):
    model, seen = net(), []

    def optimizer(m):
        seen.append(count(m))
        return sgd(m)

    result = run(model, data, epochs=1, optimizer=optimizer, **options)
    assert len(seen) == len(result.plans) == len(shares)
    for params, share, plan, record in zip(seen, shares, result.plans, result.history, strict=True):
        assert params <= share * count(model) + 1e-9 and params > 0.9 * share * count(model)
        assert plan.params == params == record["params"] and plan.params_before == count(model)
        assert record["keep"] == pytest.approx(share, abs=1e-12)
    assert count(result.model) == seen[-1] and result.model.alds_plan == result.plans[-1]


def test_a_cycle_decomposes_the_retrained_weights(data):
    """At learning rate 0 a second cycle of the same share changes nothing: the weights have the rank it wants."""
    result = run(net(), data, keep=(0.4, 0.4), epochs=1, optimizer=lambda m: torch.optim.SGD(m.parameters(), lr=0.0))
    first, second = result.plans
    assert first.error > 0.1 and second.error < 1e-5
    once = alds.compress(net(), params=0.4)
    x = torch.randn(5, 2, 6, 6)
    for twice, other in zip(result.model.children(), once.children(), strict=True):
        if isinstance(twice, nn.BatchNorm2d):
            twice.load_state_dict(other.state_dict())  # the one part that training at rate 0 does change
    torch.testing.assert_close(result.model(x), once(x))


def test_the_model_given_is_not_changed_and_modes_are_kept(data):
    model = net()
    model[1].train()
    before, modes = {k: v.clone() for k, v in model.state_dict().items()}, [m.training for m in model]
    result = run(model, data, epochs=1, cycles=2, distill=0.5)
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    assert [m.training for m in model] == modes == [m.training for m in result.model]
    assert all(p.grad is None for p in model.parameters())
    assert not any(isinstance(m, LowRankLayer) for m in model)
    assert not torch.equal(result.model[1].running_mean, model[1].running_mean)  # it was trained in training mode


@pytest.mark.slow
def test_retraining_recovers_what_compression_lost(data):
    model, x, y = net(), *data.tensors
    optimizer = adam(model.train())
    for _ in range(30):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
    model.eval()

    def loss(m):
        return nn.functional.cross_entropy(m(x), y).item()

    small = alds.compress(model, params=0.15)
    retrained = run(model, data, keep=0.15, epochs=40, optimizer=adam)
    assert loss(retrained.model) < 0.5 * loss(small)
    assert retrained.history[-1]["loss"] < retrained.history[0]["loss"]


def _trains(model, start, epochs, log):
    optimizer = sgd(model)
    for epoch in range(start, epochs):
        loss = model(torch.ones(2, 2, 6, 6)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        log({"epoch": epoch, "loss": loss.detach(), "mode": "train" if model.training else "eval"})


def test_a_training_function_of_ones_own(tmp_path):
    calls = []

    def train(model, start, epochs, log):
        calls.append((start, epochs))
        if len(calls) == 2:
            raise Stop
        _trains(model, start, epochs, log)

    options = {"train": _trains, "loss": None, "optimizer": None, "epochs": 5, "epochs_retrain": 2, "cycles": 2}
    whole = run(net(), None, **options)
    with pytest.raises(Stop):
        run(net(), None, **{**options, "train": train}, checkpoint=tmp_path)
    assert calls == [(3, 5), (3, 5)]
    resumed = run(net(), None, **options, checkpoint=tmp_path)
    assert equal(resumed.model, whole.model) and resumed.history == whole.history
    assert [(r["cycle"], r["epoch"], r["mode"]) for r in whole.history] == [
        (0, 3, "train"), (0, 4, "train"), (1, 3, "train"), (1, 4, "train")
    ]  # fmt: skip
    assert not any(m.training for m in whole.model.modules())


def test_a_training_step_gets_the_batch_as_it_is():
    seen = []

    def train_step(model, batch):
        seen.append(batch)
        return model(batch["x"]).square().mean()

    batch = {"x": torch.ones(2, 2, 6, 6), "name": "a", "more": [torch.zeros(1)]}
    run(net(), None, loader=[batch], train_step=train_step, loss=None, epochs=2)
    assert [(b["name"], len(b["more"])) for b in seen] == [("a", 1)] * 2 and torch.equal(seen[0]["x"], batch["x"])


@pytest.mark.parametrize("kind", [tuple, dict])
def test_inputs_may_be_positional_or_named(kind):
    class Sum(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, left, right):
            return self.a(left) + self.b(right)

    x = torch.ones(3, 8)
    inputs = (x, 2 * x) if kind is tuple else {"right": 2 * x, "left": x}
    torch.manual_seed(0)
    result = run(Sum(), None, loader=[(inputs, x)], loss=nn.functional.mse_loss, keep=0.7, epochs=20)
    assert result.history[-1]["loss"] < 0.5 * result.history[0]["loss"]


def test_distillation_by_hand():
    """T^2 sum_i t_i (log t_i - log s_i) and its gradient T (s - t), s and t the soft maxima at T."""
    student = torch.tensor([[1.0, -1.0, 0.5]], dtype=torch.float64, requires_grad=True)
    teacher = torch.tensor([[0.0, 2.0, -1.0]], dtype=torch.float64)
    temperature = 3.0

    def soft(row):
        weights = [math.exp(v / temperature) for v in row]
        return [w / sum(weights) for w in weights]

    s, t = soft(student[0].tolist()), soft(teacher[0].tolist())
    value = soft_target_loss(student, teacher, temperature)
    value.backward()
    assert value.item() == pytest.approx(9 * sum(b * math.log(b / a) for a, b in zip(s, t, strict=True)), rel=1e-12)
    by_hand = [temperature * (a - b) for a, b in zip(s, t, strict=True)]
    assert student.grad[0].tolist() == pytest.approx(by_hand, rel=1e-12)


@pytest.mark.parametrize("with_loss", [False, True])
def test_the_loss_mixes_the_targets_and_the_dense_model(with_loss):
    """One step of plain gradient descent against the formula; with a loss of one's own for regression."""
    torch.manual_seed(0)
    dense = nn.Sequential(nn.Linear(6, 8), nn.Dropout(0.5), nn.Linear(8, 3)).double()  # the teacher drops nothing
    x, y = torch.randn(5, 6, dtype=torch.float64), torch.tensor([0, 1, 2, 0, 1])
    small = alds.compress(dense, params=0.8)
    for model in (dense, small):
        model[1].p = 0.0 if model is small else 0.5
    options = {"distill": 0.25, "temperature": 4.0, "distill_loss": nn.functional.mse_loss if with_loss else None}

    def compress(model, keep, cycle):
        new = alds.compress(model, params=keep)
        new[1].p = 0.0
        return new

    def optimizer(model):
        return torch.optim.SGD(model.parameters(), lr=0.1)

    result = run(dense, None, keep=0.8, loader=[(x, y)], optimizer=optimizer, epochs=1, compress=compress, **options)
    with torch.no_grad():
        wanted = dense.eval()(x)
    output = small(x)
    teach = nn.functional.mse_loss(output, wanted) if with_loss else soft_target_loss(output, wanted, 4.0)
    total = 0.75 * nn.functional.cross_entropy(output, y) + 0.25 * teach
    total.backward()
    assert result.history[0]["loss"] == pytest.approx(total.item(), rel=1e-6)
    for before, after in zip(small.parameters(), result.model.parameters(), strict=True):
        torch.testing.assert_close(after, before - 0.1 * before.grad)


def test_compress_as_options_and_as_a_function(data):
    model, seen = net(), []

    def function(m, keep, cycle):
        seen.append((keep, cycle, any(isinstance(layer, LowRankLayer) for layer in m), m is model))
        return alds.compress(m, params=keep, schemes=(0,), groups=(1,))

    by_function = run(model, data, cycles=2, epochs=1, compress=function)
    by_options = run(model, data, cycles=2, epochs=1, compress={"schemes": (0,), "groups": (1,)})
    assert seen == [(0.4**0.5, 0, False, False), (0.4, 1, False, False)]
    assert equal(by_function.model, by_options.model) and by_function.plans == by_options.plans
    assert {m.slices for m in by_options.model if isinstance(m, LowRankLayer)} == {1}


def test_a_function_may_change_its_model_and_make_any_other(data):
    model = net()
    result = run(model, data, epochs=1, compress=fewer_filters)
    assert count(net()) == count(model) > count(result.model) and result.plans == (None,)
    assert result.model.pruned_to == (0.4, 0) and not hasattr(model, "pruned_to")


BAD = [
    ({"keep": 0.0}, BudgetError, "keep=0.0 is outside (0, 1]"),
    ({"keep": 1.5}, BudgetError, "keep=1.5 is outside (0, 1]"),
    ({"keep": "half"}, BudgetError, "keep='half' is outside (0, 1]"),
    ({"keep": ()}, BudgetError, "keep=() is outside"),
    ({"keep": (0.3, 0.5)}, BudgetError, "goes up"),
    ({"keep": (0.5, 0.3), "cycles": 2}, ArgumentError, "leave cycles out"),
    ({"keep": 0.001}, BudgetError, "smallest"),
    ({"keep": 0.01, "cycles": 3}, BudgetError, "smallest"),
    ({"cycles": 0}, ArgumentError, "cycles=0 is not an integer >= 1"),
    ({"epochs": 0}, ArgumentError, "epochs=0 is not an integer >= 1"),
    ({"epochs_retrain": 4}, ArgumentError, "epochs_retrain=4 is outside 1..3"),
    ({"epochs_retrain": 0}, ArgumentError, "epochs_retrain=0 is outside 1..3"),
    ({"loader": None, "loss": None, "optimizer": None}, ArgumentError, "no way to train"),
    ({"train": _trains}, ArgumentError, "train= with optimizer="),
    ({"loader": None}, ArgumentError, "loader= is missing"),
    ({"optimizer": None}, ArgumentError, "optimizer= is missing"),
    ({"loss": None}, ArgumentError, "give loss="),
    ({"train_step": lambda m, b: 0}, ArgumentError, "or train_step="),
    ({"loss": 3}, ArgumentError, "loss= is a int: expected a function"),
    ({"loader": 3}, ArgumentError, "loader= is a int: expected something that yields"),
    ({"loader": []}, ArgumentError, "yielded no batch"),
    ({"loader": [torch.zeros(3)]}, ArgumentError, "expected (inputs, targets)"),
    ({"loader": iter([(torch.zeros(2, 2, 6, 6), torch.zeros(2).long())])}, ArgumentError, "not a generator"),
    ({"loss": lambda o, t: o}, ArgumentError, "expected a tensor with one element"),
    ({"loss": lambda o, t: o.detach().mean()}, ArgumentError, "has no gradient"),
    ({"loss": lambda o, t: o.mean() * math.nan}, TrainingError, "the mean loss is nan"),
    ({"optimizer": lambda m: None}, ArgumentError, "optimizer= returned a NoneType"),
    ({"optimizer": lambda m: sgd(net())}, ArgumentError, "of other parameters"),
    ({"scheduler": lambda o: None}, ArgumentError, "scheduler= returned a NoneType"),
    ({"scheduler": lr_scheduler.ReduceLROnPlateau}, ArgumentError, "returned a ReduceLROnPlateau"),
    ({"scheduler": lambda o: step(sgd(net()))}, ArgumentError, "of another optimizer"),
    ({"distill": 1.5}, ArgumentError, "distill=1.5 is outside [0, 1]"),
    ({"distill": 0.5, "temperature": 0}, ArgumentError, "temperature=0 is outside (0, inf)"),
    ({"distill": 0.5, "loss": None, "train_step": lambda m, b: 0}, ArgumentError, "needs loss="),
    ({"distill_loss": lambda o, t: 0}, ArgumentError, "distill_loss= without distill="),
    ({"distill": 0.5, "distill_loss": 1}, ArgumentError, "distill_loss= is a int"),
    ({"compress": {"params": 0.5}}, ArgumentError, "compress= holds 'params'"),
    ({"compress": {"memory": 0.5}}, ArgumentError, "compress= holds 'memory'"),
    ({"params": 0.5}, ArgumentError, "retrain: the budget is keep=, a share of the parameters"),
    ({"flops": 0.5}, ArgumentError, "for others give compress=, a function"),
    ({"compress": {"nonsense": 1}}, ArgumentError, "unknown option 'nonsense'"),
    ({"compress": 0.5}, ArgumentError, "compress= is a float"),
    ({"compress": lambda m, k, c: None}, ModelError, "compress= returned a NoneType"),
    ({"checkpoint": 3}, ArgumentError, "checkpoint=3"),
    ({"checkpoint": "missing/run"}, MissingFileError, "create it first"),
    ({"checkpoint": __file__}, ArgumentError, "is a file"),
]


@pytest.mark.parametrize(("changes", "error", "message"), BAD, ids=[b[2] for b in BAD])
def test_bad_arguments_are_refused(data, tmp_path, monkeypatch, changes, error, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(error) as e:
        run(net(), data, **changes)
    assert message in str(e.value) and isinstance(e.value, alds.AldsError)


def test_bad_models_are_refused(data):
    for model in ("a model", nn.ReLU(), alds.compress(net(), params=0.5)):
        with pytest.raises(ModelError):
            run(model, data)


def test_distilling_other_outputs_asks_for_a_loss():
    x = torch.randn(3, 5, 8)
    with pytest.raises(ArgumentError, match=r"\(3, 5, 8\).*give distill_loss="):
        run(nn.Linear(8, 8), None, loader=[(x, x)], loss=nn.functional.mse_loss, distill=0.5)


def test_an_own_log_that_is_not_json_is_refused():
    def train(model, start, epochs, log):
        log({"model": model})

    with pytest.raises(ArgumentError, match="expected a dict of numbers and texts"):
        run(net(), None, train=train, loss=None, optimizer=None)


@pytest.mark.slow
def test_example_runs():
    pytest.importorskip("sklearn", reason="scikit-learn is an optional requirement of the example")
    script = Path(__file__).parents[2] / "examples" / "retrain.py"
    command = [sys.executable, script, "--epochs", "2", "--retrain", "1"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    for row in ("dense", "compressed", "one-shot", "3 cycles"):
        assert row in result.stdout
