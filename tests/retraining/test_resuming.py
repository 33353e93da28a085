"""Runs that are stopped go on bit-equal, and go on from no other run's state."""

import json
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from support.marks import slow
from support.training import Stop, adam, equal, fewer_filters, net, run, step, warm, without_seconds
from torch import nn
from torch.utils.data import DataLoader

import alds_fast as alds
from alds_fast.errors import (
    ArgumentError,
    FileFormatError,
    FileWriteError,
)


def _stopping(after):
    """A loss that raises at call number ``after``."""
    calls = []

    def loss(output, targets):
        calls.append(0)
        if len(calls) == after:
            raise Stop
        return nn.functional.cross_entropy(output, targets)

    return loss


CASES = {
    "sgd": {"scheduler": step},
    "adam": {"optimizer": adam, "scheduler": warm},
    "distill": {"distill": 0.3, "temperature": 3.0},
    "function": {"compress": lambda m, keep, cycle: alds.compress(m, params=keep, groups=(1,))},
    "other-structure": {"compress": fewer_filters},
}


# in both cycles of two epochs of three batches, at all places
@pytest.mark.parametrize("after", [slow(1), 5, slow(10), slow(14)])
@pytest.mark.parametrize("case", [case if case in ("sgd", "distill") else slow(case) for case in CASES])
def test_a_run_stopped_within_an_epoch_goes_on_bit_equal(data, tmp_path, case, after):
    options = {"epochs": 4, "epochs_retrain": 2, "cycles": 2, **CASES[case]}
    whole = run(net(), data, **options)
    if after <= 12:
        with pytest.raises(Stop):
            run(net(), data, **options, loss=_stopping(after), checkpoint=tmp_path / "run")
        random.seed(99), np.random.seed(99)
    seen = []
    resumed = run(net(), data, **options, checkpoint=tmp_path / "run", log=seen.append)
    assert equal(resumed.model, whole.model) and resumed.plans == whole.plans
    assert without_seconds(resumed.history) == without_seconds(whole.history)
    assert seen == list(resumed.history)[(after - 1) // 3 if after <= 12 else 0 :]
    lines = (tmp_path / "run" / "history.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == list(resumed.history)
    assert [m.training for m in resumed.model] == [m.training for m in whole.model]
    assert getattr(resumed.model, "alds_plan", None) == resumed.plans[-1]
    finished = run(net(), data, **options, checkpoint=tmp_path / "run", loss=_stopping(1))  # nothing is left to do
    assert equal(finished.model, whole.model) and finished.history == resumed.history


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
    resumed = go(nn.functional.cross_entropy, checkpoint=tmp_path)
    assert equal(resumed, whole) and resumed.head.weight is resumed.embedding.weight
    frozen = {name for name, p in whole.named_parameters() if not p.requires_grad}
    assert frozen == {name for name, p in resumed.named_parameters() if not p.requires_grad}
    assert frozen == {"body.encoder", "body.decoder"}


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
    for place in range(len(whole) // 2, len(whole) // 2 + 128):  # some of a file is padding
        middle[place] ^= 1
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
