"""Retraining: rewound learning rates, budgets of every cycle, bit-equal resumption, distillation, refusals."""

import json
import math
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from support.models import count
from torch import nn
from torch.optim import lr_scheduler
from torch.utils.data import DataLoader, TensorDataset

import alds_fast as alds
from alds_fast.errors import (
    ArgumentError,
    BudgetError,
    FileFormatError,
    FileWriteError,
    MissingFileError,
    ModelError,
    TrainingError,
)
from alds_fast.layers import LowRankLayer
from alds_fast.retraining.loop import soft_target_loss


def net(seed=0):
    """Convolution, batch norm, dropout and a linear layer on 2 x 6 x 6 images; in evaluation mode."""
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(2, 12, 3, padding=1), nn.BatchNorm2d(12), nn.ReLU(), nn.Dropout(0.2), nn.Conv2d(12, 12, 3),
        nn.ReLU(), nn.Flatten(), nn.Linear(192, 24), nn.ReLU(), nn.Linear(24, 4),
    ).eval()  # fmt: skip


@pytest.fixture(scope="module")
def data():
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(48, 2, 6, 6, generator=generator)
    return TensorDataset(x, (x[:, 0].mean((1, 2)) > 0).long() + 2 * (x[:, 1].mean((1, 2)) > 0).long())


def sgd(model):
    return torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-3)


def adam(model):
    return torch.optim.Adam(model.parameters(), lr=3e-3)


def step(optimizer):
    return lr_scheduler.MultiStepLR(optimizer, [2, 5], 0.1)


def cosine(optimizer):
    return lr_scheduler.CosineAnnealingLR(optimizer, 7)


def warm(optimizer):
    """Made of two schedules, the second with numbers of numpy's."""
    first = lr_scheduler.LinearLR(optimizer, 0.1, total_iters=2)
    second = lr_scheduler.LambdaLR(optimizer, lambda epoch: np.cos(0.1 * epoch))
    return lr_scheduler.SequentialLR(optimizer, [first, second], [2])


def run(model, data, **changes):
    torch.manual_seed(5)
    options = {"keep": 0.4, "epochs": 3, "loss": nn.functional.cross_entropy, "optimizer": sgd, **changes}
    if "train" not in options and "loader" not in options:
        options["loader"] = DataLoader(data, 16, shuffle=True)
    return alds.retrain(model, **options)


def equal(a, b):
    pairs = zip(a.state_dict().items(), b.state_dict().items(), strict=True)
    return all(n == m and v.dtype == w.dtype and torch.equal(v, w) for (n, v), (m, w) in pairs)


def without_seconds(history):
    return [{k: v for k, v in record.items() if k != "seconds"} for record in history]


@pytest.mark.parametrize("schedule", [step, cosine, warm, None])
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
    again = run(model, data, keep=0.15, epochs=25, optimizer=adam)
    assert loss(again.model) < 0.5 * loss(small)
    assert again.history[-1]["loss"] < again.history[0]["loss"]


class Stop(Exception):
    pass


def _stopping(after):
    """A loss that raises at call number ``after``."""
    calls = []

    def loss(output, targets):
        calls.append(0)
        if len(calls) == after:
            raise Stop
        return nn.functional.cross_entropy(output, targets)

    return loss


def _dense_filters(model, keep, cycle):
    """Not low-rank: a random half of the filters of the first layer goes in every cycle; another structure."""
    conv, norm, follow = model[0], model[1], model[4]
    chosen = torch.randperm(conv.out_channels)[: conv.out_channels // 2].sort().values
    conv.weight, conv.bias = nn.Parameter(conv.weight[chosen].detach()), nn.Parameter(conv.bias[chosen].detach())
    follow.weight = nn.Parameter(follow.weight[:, chosen].detach())
    model[1] = nn.BatchNorm2d(len(chosen)).eval()
    model[1].weight = nn.Parameter(norm.weight[chosen].detach())
    conv.out_channels = follow.in_channels = len(chosen)
    model.pruned_to = keep, cycle
    return model


CASES = {
    "sgd": {"scheduler": step},
    "adam": {"optimizer": adam, "scheduler": warm},
    "distill": {"distill": 0.3, "temperature": 3.0},
    "function": {"compress": lambda m, keep, cycle: alds.compress(m, params=keep, groups=(1,))},
    "other-structure": {"compress": _dense_filters},
}


@pytest.mark.parametrize("after", [1, 5, 10, 14])  # in both cycles of two epochs of three batches, at all places
@pytest.mark.parametrize("case", CASES)
def test_a_run_stopped_within_an_epoch_goes_on_bit_equal(data, tmp_path, case, after):
    options = {"epochs": 4, "epochs_retrain": 2, "cycles": 2, **CASES[case]}
    whole = run(net(), data, **options)
    if after <= 12:
        with pytest.raises(Stop):
            run(net(), data, **options, loss=_stopping(after), checkpoint=tmp_path / "run")
        random.seed(99), np.random.seed(99)
    seen = []
    again = run(net(), data, **options, checkpoint=tmp_path / "run", log=seen.append)
    assert equal(again.model, whole.model) and again.plans == whole.plans
    assert without_seconds(again.history) == without_seconds(whole.history)
    assert seen == list(again.history)[(after - 1) // 3 if after <= 12 else 0 :]
    lines = (tmp_path / "run" / "history.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == list(again.history)
    assert [m.training for m in again.model] == [m.training for m in whole.model]
    assert getattr(again.model, "alds_plan", None) == again.plans[-1]
    finished = run(net(), data, **options, checkpoint=tmp_path / "run", loss=_stopping(1))  # nothing is left to do
    assert equal(finished.model, whole.model) and finished.history == again.history


def test_generators_of_the_loader_and_of_python_and_numpy_are_restored(tmp_path):
    class Noisy(torch.utils.data.Dataset):
        def __len__(self):
            return 12

        def __getitem__(self, i):
            return torch.full((8,), random.random() + np.random.rand()), torch.tensor([float(i)])

    def go(loss, **options):
        torch.manual_seed(0), random.seed(0), np.random.seed(0)
        loader = DataLoader(Noisy(), 4, shuffle=True, generator=torch.Generator().manual_seed(7))
        torch.manual_seed(1)
        model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 1))
        return run(model, None, keep=0.8, loader=loader, loss=loss, epochs=3, optimizer=adam, **options)

    calls = []

    def stopping(output, targets):
        calls.append(0)
        if len(calls) == 5:
            raise Stop
        return nn.functional.mse_loss(output, targets)

    whole = go(nn.functional.mse_loss)
    with pytest.raises(Stop):
        go(stopping, checkpoint=tmp_path)
    assert equal(go(nn.functional.mse_loss, checkpoint=tmp_path).model, whole.model)


def test_frozen_and_tied_parameters_survive_a_stop(tmp_path):
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding, self.body, self.head = nn.Embedding(9, 16), nn.Linear(16, 16), nn.Linear(16, 9, bias=False)
            self.head.weight = self.embedding.weight

        def forward(self, x):
            return self.head(self.body(self.embedding(x)))

    def go(loss, **options):
        torch.manual_seed(2)
        model = Tied()
        model.body.weight.requires_grad_(False)
        batches = [(torch.arange(9), torch.arange(9))] * 2
        return run(model, None, loader=batches, loss=loss, epochs=2, keep=0.8, optimizer=adam, **options).model

    whole = go(nn.functional.cross_entropy)
    with pytest.raises(Stop):
        go(_stopping(3), checkpoint=tmp_path)
    again = go(nn.functional.cross_entropy, checkpoint=tmp_path)
    assert equal(again, whole) and again.head.weight is again.embedding.weight
    frozen = {name for name, p in whole.named_parameters() if not p.requires_grad}
    assert frozen == {name for name, p in again.named_parameters() if not p.requires_grad}
    assert frozen == {"body.encoder", "body.decoder"}


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
    again = run(net(), None, **options, checkpoint=tmp_path)
    assert equal(again.model, whole.model) and again.history == whole.history
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


@pytest.mark.parametrize("own", [False, True])
def test_the_loss_mixes_the_targets_and_the_dense_model(own):
    """One step of plain gradient descent against the formula; with a loss of one's own for regression."""
    torch.manual_seed(0)
    dense = nn.Sequential(nn.Linear(6, 8), nn.Dropout(0.5), nn.Linear(8, 3)).double()  # the teacher drops nothing
    x, y = torch.randn(5, 6, dtype=torch.float64), torch.tensor([0, 1, 2, 0, 1])
    small = alds.compress(dense, params=0.8)
    for model in (dense, small):
        model[1].p = 0.0 if model is small else 0.5
    options = {"distill": 0.25, "temperature": 4.0, "distill_loss": nn.functional.mse_loss if own else None}

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
    teach = nn.functional.mse_loss(output, wanted) if own else soft_target_loss(output, wanted, 4.0)
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
    assert {m.groups for m in by_options.model if isinstance(m, LowRankLayer)} == {1}


def test_a_function_may_change_its_model_and_make_any_other(data):
    model = net()
    result = run(model, data, epochs=1, compress=_dense_filters)
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


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"keep": 0.3}, "keep was [0.4], is [0.3]"),
        ({"epochs": 4}, "epochs was [3, 3], is [4, 4]"),
        ({"epochs_retrain": 2}, "epochs was [3, 3], is [3, 2]"),
        ({"distill": 0.5}, "distill was [0.0, 2.0], is [0.5, 2.0]"),
        ({"compress": {"schemes": (0,)}}, "compress was {}, is {'schemes': [0]}"),
        ({"scheduler": step}, "given was"),
        ({"optimizer": adam}, "made with SGD"),
        ({"optimizer": lambda m: torch.optim.SGD(m.parameters(), lr=0.1, momentum=0.9)}, "(lr, weight_decay)"),
        ({"model": 1}, "model was"),
        ({"loader": [(torch.zeros(2, 2, 6, 6), torch.zeros(2).long())]}, "has 0 random generators"),
    ],
)
def test_a_checkpoint_of_another_run_is_refused(data, tmp_path, changes, message):
    loader = DataLoader(data, 16, shuffle=True, generator=torch.Generator())
    with pytest.raises(Stop):
        run(net(), data, loader=loader, checkpoint=tmp_path, loss=_stopping(4))
    kept = (tmp_path / "state.pt").read_bytes()
    with pytest.raises(ArgumentError) as e:
        run(net(changes.pop("model", 0)), data, **{"loader": loader, **changes}, checkpoint=tmp_path)
    assert message in str(e.value) and (tmp_path / "state.pt").read_bytes() == kept


def test_a_damaged_checkpoint_is_refused(data, tmp_path):
    run(net(), data, epochs=1, checkpoint=tmp_path)
    path = tmp_path / "state.pt"
    whole = path.read_bytes()
    middle = bytearray(whole)
    middle[len(whole) // 2] ^= 1
    for damaged in (whole[: len(whole) // 2], bytes(middle), b"", b"nonsense"):
        path.write_bytes(damaged)
        with pytest.raises(FileFormatError, match="delete the directory to start anew"):
            run(net(), data, epochs=1, checkpoint=tmp_path)
    torch.save({"format": "another"}, path)
    with pytest.raises(FileFormatError, match=r"not written by alds_fast.retrain"):
        run(net(), data, epochs=1, checkpoint=tmp_path)
    path.write_bytes(whole)
    state = torch.load(path, weights_only=True)
    torch.save({**state, "version": 99}, path)
    with pytest.raises(FileFormatError, match="version 99, newer"):
        run(net(), data, epochs=1, checkpoint=tmp_path)


def test_a_file_that_would_run_code_is_refused(data, tmp_path):
    class Evil:
        def __reduce__(self):
            return (Path(tmp_path / "ran").touch, ())

    torch.save({"format": "alds_fast.retrain", "evil": Evil()}, tmp_path / "state.pt")
    with pytest.raises(FileFormatError):
        run(net(), data, checkpoint=tmp_path)
    assert not (tmp_path / "ran").exists()


def test_a_failed_write_says_so(data, tmp_path, monkeypatch):
    monkeypatch.setattr(torch, "save", lambda *args: (_ for _ in ()).throw(OSError("no space left")))
    with pytest.raises(FileWriteError, match="no space left"):
        run(net(), data, checkpoint=tmp_path)


def test_example_runs():
    pytest.importorskip("sklearn", reason="scikit-learn is an optional requirement of the example")
    script = Path(__file__).parents[2] / "examples" / "retrain.py"
    command = [sys.executable, script, "--epochs", "2", "--retrain", "1"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    for row in ("dense", "compressed", "one-shot", "3 cycles"):
        assert row in result.stdout
