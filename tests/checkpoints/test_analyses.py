"""Analyses in files: the same plans bit for bit, only for the model that was analysed, and whole files only."""

import copy
import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from support.models import images
from torch import nn

import alds_fast as alds
from alds_fast.errors import ArgumentError, FileFormatError, MissingFileError, ModelError


def small_net():
    torch.manual_seed(0)
    layers = nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 8, 3, groups=2), nn.AdaptiveAvgPool2d(1)
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 4)).eval()


DATA = {"groups": (1, 2), "schemes": (0, 3), "data": [images(16, 3), images(16, 4)], "sensitivity": True}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """The model, its analysis with data, of which one plan is known, and the file of that."""
    model, path = small_net(), tmp_path_factory.mktemp("analysis") / "a.safetensors"
    analysis = alds.analyze(model, **DATA, exclude="8")
    analysis.plan(params=0.6)
    alds.save_analysis(analysis, path)
    return model, analysis, path


def equal(a, b):
    """Whether two plans, and the models that they make, are one and the same."""
    (plan, model), (other, same) = a, b
    states = (p.apply(m).state_dict() for p, m in ((plan, model), (other, same)))
    return plan.to_json() == other.to_json() and all(map(torch.equal, *(s.values() for s in states)))


PLANS = {
    "known": {"params": 0.6},
    "another share": {"params": 0.4},
    "error": {"error": 0.01},
    "flops": {"flops": 0.7, "example_inputs": images()},
    "bound": {"params": 0.6, "criterion": "output-bound"},
    "weights alone": {"params": 0.6, "criterion": "frobenius", "pivots": False},
    "no bias": {"params": 0.6, "bias_correction": False},
    "baseline": {"params": 0.6, "method": "pca"},
}


@pytest.mark.parametrize("options", PLANS.values(), ids=PLANS)
def test_plans_are_bit_equal(saved, options):
    model, analysis, path = saved
    loaded, same = alds.load_analysis(path, model), small_net()
    assert equal((analysis.plan(**options), model), (loaded.plan(**options), same))
    assert (str(loaded), loaded.params) == (str(analysis), analysis.params)


def test_what_is_known_is_not_worked_out_again(saved, monkeypatch):
    model, analysis, path = saved
    loaded = alds.load_analysis(path, model)

    def refuse(*_):
        raise AssertionError("errors were computed")

    monkeypatch.setattr("alds_fast.criteria.weighted_errors.errors", refuse)
    assert loaded.plan(params=0.6) == analysis.plan(params=0.6)


def test_without_data_and_in_float32(tmp_path):
    model = nn.Sequential(nn.Linear(96, 80), nn.ReLU(), nn.Linear(80, 64))
    analysis = alds.analyze(model, precision="float32", groups=(4, 1))
    alds.save_analysis(analysis, tmp_path / "a.safetensors")
    loaded = alds.load_analysis(tmp_path / "a.safetensors", model)
    assert [list(s.values) for s in loaded.spectra.values()] == [list(s.values) for s in analysis.spectra.values()]
    assert all(s.float32 for s in loaded.spectra.values()) and loaded.max_groups is None
    assert loaded.plan(params=0.5) == analysis.plan(params=0.5)
    with torch.no_grad():
        model[0].bias.zero_()  # spectra do not depend on it
    alds.load_analysis(tmp_path / "a.safetensors", model)


class Attentive(nn.Module):
    """Its attention is opened, its weight-normed layer is folded, and its units can be removed."""

    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(16, 2, batch_first=True)
        self.second = nn.MultiheadAttention(16, 2, batch_first=True)
        self.normed = nn.utils.parametrizations.weight_norm(nn.Linear(16, 16))
        self.up, self.down = nn.Linear(16, 64), nn.Linear(64, 16)

    def forward(self, x, scale):
        y = x + self.attention(x, x, x)[0] + self.second(x, x, x)[0] + self.normed(x)
        return y + scale["factor"] * self.down(torch.relu(self.up(y)))


def test_opened_modules_hidden_units_and_batches_of_several_kinds(tmp_path):
    torch.manual_seed(0)
    model = Attentive().eval()
    data = [{"x": torch.randn(8, 12, 16), "scale": {"factor": 0.5}} for _ in range(2)]
    analysis = alds.analyze(model, data=data, sensitivity=True, exclude="second", groups=(1,), schemes=(0,))
    alds.save_analysis(analysis, tmp_path / "a.safetensors")
    again = copy.deepcopy(model)
    loaded = alds.load_analysis(tmp_path / "a.safetensors", again)
    assert str(loaded) == str(analysis) and loaded.inputs["scale"] == {"factor": 0.5}
    options = {"params": 0.5, "hidden_units": True}
    plan = analysis.plan(**options)
    assert plan.hidden_units and equal((plan, model), (loaded.plan(**options), again))


def test_compressed_models_and_layers_that_share_a_moment(tmp_path):
    model = alds.compress(small_net(), params=0.6)
    analysis = alds.analyze(model, **DATA)
    alds.save_analysis(analysis, tmp_path / "a.safetensors")
    assert alds.load_analysis(tmp_path / "a.safetensors", model).plan(params=0.7) == analysis.plan(params=0.7)
    torch.manual_seed(0)
    shared = nn.MultiheadAttention(8, 2)  # its three parts see one input
    seen = torch.randn(3, 9, 5, 8).unbind()
    analysis = alds.analyze(shared, data=[seen])
    alds.save_analysis(analysis, tmp_path / "b.safetensors")
    loaded = alds.load_analysis(tmp_path / "b.safetensors", shared)
    own, read = ({id(m.second) for m in a.moments.values()} for a in (analysis, loaded))
    assert len(own) == len(read)


def changed_weight(model):
    with torch.no_grad():
        model[0].weight[0, 0, 0, 0] += 1


def changed_statistics(model):
    model[1].running_mean += 1


def another_type(model):
    return model.double()


def another_shape(model):
    model[8] = nn.Linear(6, 5)


def other_layers(model):
    return nn.Sequential(nn.Linear(model_params(model) - 1, 1, bias=False), nn.BatchNorm1d(1, affine=False), nn.PReLU())


def model_params(model):
    return sum(p.numel() for p in model.parameters())


def tied(model):
    model[0].bias = model[1].bias
    model.register_parameter("filling", nn.Parameter(torch.zeros(16)))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (changed_weight, r"'0\.weight' has other values than when it was analysed"),
        (changed_statistics, r"'1\.running_mean' has other values"),
        (another_type, r"'0\.weight' was torch.float32 .* and is torch.float64"),
        (another_shape, r"is of 1,146 parameters, the model has 1,153"),
        (other_layers, "the analysis has a layer '3' and the other has none"),
        (tied, "layer '0': own_bias was True and is False"),
    ],
)
def test_other_models_are_refused(saved, change, words):
    model = small_net()
    model = change(model) or model
    with pytest.raises(ModelError, match=f"(?s){words}.*analyze the model again"):
        alds.load_analysis(saved[2], model)


def test_what_has_changed_since_it_was_analysed_is_not_written(tmp_path):
    model = small_net()
    analysis = alds.analyze(model, groups=(1,))
    changed_weight(model)
    with pytest.raises(ModelError, match="layer '0': its weight has changed since it was analysed"):
        alds.save_analysis(analysis, tmp_path / "a.safetensors")
    assert not list(tmp_path.iterdir())


def rewritten(path, target, **changes):
    """The file with other metadata."""
    with safe_open(path, "pt") as f:
        metadata = f.metadata()
    save_file(load_file(path), target, {**metadata, **changes})
    return target


def test_damaged_foreign_and_newer_files_are_refused(saved, tmp_path):
    model, _, path = saved
    whole, bad = path.read_bytes(), tmp_path / "bad.safetensors"
    for cut in (0, 7, len(whole) // 2, len(whole) - 1):
        bad.write_bytes(whole[:cut])
        with pytest.raises(FileFormatError, match="not a whole safetensors file"):
            alds.load_analysis(bad, model)
    bad.write_bytes(whole[:-1] + bytes([whole[-1] ^ 64]))
    with pytest.raises(FileFormatError, match="is damaged .CRC-32 differs"):
        alds.load_analysis(bad, model)
    with pytest.raises(FileFormatError, match="has format version 2, newer than 1; update alds_fast"):
        alds.load_analysis(rewritten(path, bad, version="2"), model)
    with safe_open(path, "pt") as f:
        notes = json.loads(f.metadata()["analysis"])
    for damage in (json.dumps({**notes, "max_groups": 4}), "{"):
        with pytest.raises(FileFormatError, match="has damaged metadata .its CRC-32 differs"):
            alds.load_analysis(rewritten(path, bad, analysis=damage), model)
    with pytest.raises(MissingFileError):
        alds.load_analysis(tmp_path / "none.safetensors", model)


def test_files_of_models_and_of_analyses_are_told_apart(saved, tmp_path):
    model, analysis, path = saved
    small = analysis.plan(params=0.6).apply(model)
    alds.save(small, tmp_path / "m.safetensors")
    with pytest.raises(FileFormatError, match=r"not written by alds_fast\.save: alds_fast\.save_analysis did"):
        alds.load(path, model)
    with pytest.raises(FileFormatError, match=r"not written by alds_fast\.save_analysis: alds_fast\.save did"):
        alds.load_analysis(tmp_path / "m.safetensors", model)
    with pytest.raises(ModelError, match=r"an Analysis, which save_analysis\(analysis, path\) writes"):
        alds.save(analysis, path)
    with pytest.raises(ArgumentError, match="analysis is a Sequential: pass what analyze"):
        alds.save_analysis(model, path)
    with pytest.raises(ArgumentError, match=r"name it a\.safetensors"):
        alds.save_analysis(analysis, tmp_path / "a.pt")


def test_a_write_that_fails_leaves_the_old_file(saved, monkeypatch):
    _, analysis, path = saved
    whole = path.read_bytes()
    monkeypatch.setattr("alds_fast.checkpoints.analyses._bytes", lambda tensor: iter([b""]))
    with pytest.raises(AssertionError):
        alds.save_analysis(analysis, path)
    assert path.read_bytes() == whole and [p.name for p in path.parent.iterdir()] == [path.name]


def test_a_batch_that_no_file_can_hold_is_refused(tmp_path):
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(16, 16)

        def forward(self, x, how=None):
            return self.fc(x)

    model, data = Scaled(), [{"x": torch.randn(8, 16), "how": object()}]
    with pytest.raises(ArgumentError, match=r"holds a object, which no file can hold: pass analyze\(example_inputs="):
        alds.save_analysis(alds.analyze(model, data=data), tmp_path / "a.safetensors")
    alds.save_analysis(alds.analyze(model, data=data, example_inputs=[torch.randn(8, 16)]), tmp_path / "a.safetensors")
    assert type(alds.load_analysis(tmp_path / "a.safetensors", model).inputs) is list
