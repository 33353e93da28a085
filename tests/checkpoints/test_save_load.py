import json
import os
import signal
import subprocess
import sys

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from support.models import Wrapped, images, small_net
from torch import nn

import alds_fast as alds
from alds_fast.checkpoints import read_header, save_load
from alds_fast.errors import (
    ArgumentError,
    FileFormatError,
    FileWriteError,
    LayerNotFoundError,
    MissingFileError,
    ModelError,
    PlanError,
)


@pytest.fixture
def small():
    return alds.compress(small_net(), params=0.5, p=float("inf"))


@pytest.fixture
def path(tmp_path, small):
    alds.save(small, tmp_path / "small.safetensors")
    return tmp_path / "small.safetensors"


@pytest.mark.parametrize("source", [lambda: small_net(7), "function", "meta"])
def test_load_rebuilds_on_a_fresh_model_and_is_bit_equal(path, small, source):
    if source == "function":
        loaded = alds.load(path, lambda: small_net(7))
    elif source == "meta":
        with torch.device("meta"):
            fresh = small_net()
        loaded = alds.load(path, fresh)
    else:
        loaded = alds.load(path, source())
    assert torch.equal(loaded(images()), small(images()))
    assert loaded.alds_plan == small.alds_plan and repr(loaded) == repr(small)
    assert list(loaded.state_dict()) == list(small.state_dict())


def test_load_does_not_change_the_model_given(path):
    fresh = small_net(7)
    before = {k: v.clone() for k, v in fresh.state_dict().items()}
    alds.load(path, fresh)
    assert type(fresh[3]) is nn.Conv2d
    assert all(torch.equal(before[k], v) for k, v in fresh.state_dict().items())


@pytest.mark.parametrize("change", ["half", "channels_last", "double"])
def test_types_and_memory_order_survive(tmp_path, change):
    model = alds.compress(small_net(), params=0.5)
    x = images()
    if change == "channels_last":
        model = model.to(memory_format=torch.channels_last)
    else:
        dtype = {"half": torch.bfloat16, "double": torch.float64}[change]
        model, x = model.to(dtype), x.to(dtype)
    alds.save(model, tmp_path / "m.safetensors")
    loaded = alds.load(tmp_path / "m.safetensors", small_net)
    for (name, a), b in zip(model.state_dict().items(), loaded.state_dict().values(), strict=True):
        assert torch.equal(a, b) and a.dtype == b.dtype, name
        assert a.stride() == b.stride() or a.is_contiguous(), name
    assert torch.equal(loaded(x), model(x))


def test_training_goes_on_after_loading(path):
    loaded = alds.load(path, small_net)
    loaded(images()).square().mean().backward()
    assert all(p.grad is not None for p in loaded.parameters())


class _Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding, self.body, self.head = nn.Embedding(40, 16), nn.Linear(16, 16), nn.Linear(16, 40, bias=False)
        self.head.weight = self.embedding.weight
        self.second_body = self.body

    def forward(self, x):
        return self.head(self.second_body(self.body(self.embedding(x))))


def test_tied_weights_are_stored_once_and_stay_tied(tmp_path):
    small, x = alds.compress(_Tied(), error=0.8), torch.arange(6)
    alds.save(small, tmp_path / "m.safetensors")
    with safe_open(tmp_path / "m.safetensors", "pt") as f:
        assert sorted(f.keys()) == ["body.bias", "body.decoder", "body.encoder", "embedding.weight"]
    with torch.device("meta"):
        meta = _Tied()
    for fresh in (_Tied(), meta):
        loaded = alds.load(tmp_path / "m.safetensors", fresh)
        assert loaded.head.weight is loaded.embedding.weight and loaded.second_body is loaded.body
        assert torch.equal(loaded(x), small(x))


class _Transposed(nn.Module):
    """An autoencoder whose decoder is the transposed encoder: one memory, two parameters."""

    def __init__(self, tied=True):
        super().__init__()
        self.encoder, self.body, self.decoder = nn.Linear(20, 12), nn.Linear(12, 12), nn.Linear(12, 20)
        if tied:
            self.decoder.weight = nn.Parameter(self.encoder.weight.data.t())

    def forward(self, x):
        return self.decoder(self.body(self.encoder(x)))


def test_views_of_one_memory_stay_tied(tmp_path):
    small, x = alds.compress(_Transposed(), error=0.7), torch.randn(3, 20)
    alds.save(small, tmp_path / "m.safetensors")
    loaded = alds.load(tmp_path / "m.safetensors", _Transposed)
    assert loaded.decoder.weight.data_ptr() == loaded.encoder.weight.data_ptr() and torch.equal(loaded(x), small(x))


def test_a_file_of_an_untied_model_is_not_tied_silently(tmp_path):
    alds.save(alds.compress(_Transposed(tied=False), error=0.7, include="body"), tmp_path / "m.safetensors")
    with pytest.raises(PlanError, match="shares memory in the model, but not in the file"):
        alds.load(tmp_path / "m.safetensors", _Transposed)


class _Relu(nn.Linear):
    def forward(self, x):
        return super().forward(x).relu()


def test_a_layer_with_a_forward_of_its_own_is_not_replaced_on_load(path):
    other = small_net()
    other[8] = _Relu(32, 10)
    with pytest.raises(PlanError, match="layer '8' of the model cannot be replaced: _Relu is a subclass"):
        alds.load(path, other)


def test_a_dense_plan_can_be_saved_too(tmp_path):
    model = alds.compress(small_net(), params=1.0)
    alds.save(model, tmp_path / "m.safetensors")
    assert torch.equal(alds.load(tmp_path / "m.safetensors", small_net)(images()), model(images()))


def test_a_single_layer_is_a_model(tmp_path):
    small = alds.compress(nn.Linear(32, 32), params=0.5)
    alds.save(small, tmp_path / "m.safetensors")
    loaded = alds.load(tmp_path / "m.safetensors", nn.Linear(32, 32))
    assert torch.equal(loaded.dense_weight(), small.dense_weight())


# ------------------------------------------------------------------------------------------------ bad files


def test_every_truncation_is_refused(path, tmp_path):
    whole = path.read_bytes()
    for size in (0, 1, 7, 8, 100, len(whole) // 2, len(whole) - 1):
        (tmp_path / "cut.safetensors").write_bytes(whole[:size])
        with pytest.raises(FileFormatError, match="is not a whole safetensors file"):
            alds.load(tmp_path / "cut.safetensors", small_net)


def test_a_flipped_bit_in_the_data_is_refused(path):
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(data)
    with pytest.raises(FileFormatError, match="tensor '.*' is corrupt"):
        alds.load(path, small_net)


def test_files_that_are_something_else_are_refused(tmp_path):
    torch.save({"a": torch.zeros(2)}, tmp_path / "pickle.pt")
    (tmp_path / "text.txt").write_text("hello, world; this is not a model")
    for name in ("pickle.pt", "text.txt"):
        with pytest.raises(FileFormatError, match="is not a whole safetensors file"):
            alds.load(tmp_path / name, small_net)
    save_file({"a": torch.zeros(2)}, tmp_path / "plain.safetensors")
    with pytest.raises(FileFormatError, match=r"was not written by alds_fast\.save"):
        alds.load(tmp_path / "plain.safetensors", small_net)


def test_missing_files_and_directories(tmp_path, small):
    with pytest.raises(MissingFileError, match="does not exist") as e:
        alds.load(tmp_path / "none.safetensors", small_net)
    assert isinstance(e.value, FileNotFoundError)
    with pytest.raises(MissingFileError):
        alds.load(tmp_path, small_net)
    with pytest.raises(MissingFileError, match="the directory .* does not exist"):
        alds.save(small, tmp_path / "no" / "m.safetensors")


def _rewrite(path, **changes):
    with safe_open(path, "pt") as f:
        metadata = f.metadata()
    save_file(load_file(path), path, {**metadata, **changes})


def test_a_newer_format_version_is_refused(path):
    _rewrite(path, version="4")
    with pytest.raises(FileFormatError, match="format version 4, newer than 3; update alds_fast"):
        alds.load(path, small_net)


@pytest.mark.parametrize("key", ["version", "layers", "aliases", "orders", "crc32", "plan"])
@pytest.mark.parametrize(
    "text", ["{", "[]", "4", '{"0": {}}', '{"0.encoder": 3}', '{"0.encoder": [5, 7]}', '{"a": "zz"}']
)
def test_damaged_metadata_is_refused(path, key, text):
    if key != "version" or text != "4":  # that is another version
        _rewrite(path, **{key: text})
        with pytest.raises(FileFormatError, match="damaged metadata|is missing|is corrupt"):
            alds.load(path, small_net)


def test_an_impossible_structure_is_refused(path):
    layers = read_header(path)["layers"]
    layers["5"]["rank"] = 1000
    _rewrite(path, layers=json.dumps(layers))
    with pytest.raises(alds.AldsError, match="rank=1000 is outside"):
        alds.load(path, small_net)


def test_the_wrong_model_is_refused(path):
    remedy = ".*; build the model as the one that was compressed"
    with pytest.raises(LayerNotFoundError, match=f"the file's layer '0' is not a Linear or convolution{remedy}"):
        alds.load(path, nn.Sequential(nn.ReLU()))
    other = small_net()
    other[5] = nn.Conv2d(32, 40, 1)
    shapes = r"layer '5': the file has weight shape \(32, 32, 1, 1\), the model \(40"
    with pytest.raises(PlanError, match=shapes + remedy):
        alds.load(path, other)
    with pytest.raises(PlanError, match=f"the file is of another model: missing .'9.bias'{remedy}"):
        alds.load(path, nn.Sequential(*small_net(), nn.BatchNorm1d(10)))
    norm = small_net()
    norm[1] = nn.BatchNorm2d(7)
    with pytest.raises(PlanError, match=r"'1.weight': the file has shape \(24,\), the model \(7,\)" + remedy):
        alds.load(path, norm)
    with pytest.raises(ModelError, match="the function that builds it failed"):
        alds.load(path, lambda size: small_net())
    for thing in (None, 3, lambda: "model"):
        with pytest.raises(ModelError, match="pass the dense"):
            alds.load(path, thing)


# ------------------------------------------------------------------------------------------------- saving


def test_only_compressed_models_are_saved(tmp_path):
    with pytest.raises(ModelError, match="no low-rank layer and no plan"):
        alds.save(small_net(), tmp_path / "m.safetensors")
    with pytest.raises(ModelError, match="pass the torch"):
        alds.save({}, tmp_path / "m.safetensors")
    with pytest.raises(ModelError, match="meta device and has no values"):
        alds.save(alds.compress(small_net(), params=0.5).to("meta"), tmp_path / "m.safetensors")
    assert list(tmp_path.iterdir()) == []


def test_only_files_are_written_over(tmp_path, small):
    os.mkfifo(tmp_path / "pipe")
    for target in (tmp_path / "pipe", tmp_path):
        with pytest.raises(alds.AldsError, match="is a directory or a device, not a file"):
            alds.save(small, target)
    for target in (None, b"bytes", 3, "nul\0"):
        with pytest.raises(alds.AldsError, match="expected the name of a file"):
            alds.save(small, target)


def test_names_of_pickled_files_are_refused(tmp_path, small):
    for name in ("m.pt", "m.PTH", "m.bin", "m.ckpt"):
        with pytest.raises(alds.AldsError, match=r"would be a safetensors file: name it m\.safetensors"):
            alds.save(small, tmp_path / name)
    assert not list(tmp_path.iterdir())


def test_links_and_permissions_are_kept(path, small):
    path.chmod(0o600)
    link = path.parent / "link.safetensors"
    link.symlink_to(path)
    alds.save(small, link)
    assert link.is_symlink() and path.stat().st_mode & 0o777 == 0o600
    assert torch.equal(alds.load(path, small_net)(images()), small(images()))


def test_a_failed_save_leaves_the_old_file_whole(path, small, monkeypatch):
    whole = path.read_bytes()

    def broken(tensors, target, metadata):
        with open(target, "wb") as f:
            f.write(b"half a file")
        raise OSError("no space left on device")

    monkeypatch.setattr(save_load, "save_file", broken)
    with pytest.raises(FileWriteError, match="no space left on device.*; what stood there before is unchanged") as e:
        alds.save(small, path)
    assert isinstance(e.value, OSError)
    assert path.read_bytes() == whole and [p.name for p in path.parent.iterdir()] == [path.name]


@pytest.mark.slow
@pytest.mark.parametrize("moment", ["before", "halfway", "written"])
def test_a_killed_save_leaves_the_old_file_whole(path, moment):
    """A process is killed while it writes over the file: nothing, half or all of the new data is on disk by then."""
    script = (
        "import os, signal, sys, torch, alds_fast as alds\n"
        "from alds_fast.checkpoints import save_load\n"
        "write, moment = save_load.save_file, sys.argv[2]\n"
        "def killed(tensors, target, metadata):\n"
        "    if moment != 'before':\n"
        "        write(tensors, target, metadata)\n"
        "    if moment == 'halfway':\n"
        "        os.truncate(target, os.path.getsize(target) // 2)\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
        "save_load.save_file = killed\n"
        "alds.save(alds.compress(torch.nn.Linear(40, 40), params=0.5), sys.argv[1])\n"
    )
    whole = path.read_bytes()
    result = subprocess.run([sys.executable, "-c", script, str(path), moment], timeout=120)
    assert result.returncode == -signal.SIGKILL and path.read_bytes() == whole


def test_a_saved_file_has_ordinary_permissions(path):
    mask = os.umask(0)
    os.umask(mask)
    assert path.stat().st_mode & 0o777 == 0o666 & ~mask


@pytest.mark.filterwarnings("ignore:no layer can be decomposed")
def test_a_state_without_memory_of_its_own_is_refused(tmp_path):
    model = nn.Sequential(nn.Linear(8, 8))
    model[0].weight = nn.Parameter(Wrapped(model[0].weight.data))
    small = alds.compress(model, error=0.5)
    with pytest.raises(ModelError, match=r"state '0\.weight' is a Wrapped.*save the model before it is quantised"):
        alds.save(small, tmp_path / "model.st")


def test_a_file_alone_is_no_model(tmp_path):
    with pytest.raises(ArgumentError, match=r"load: model= is missing: .* pass the dense torch\.nn\.Module"):
        alds.load(tmp_path / "small.safetensors")


def test_files_and_directories_are_not_taken_for_each_other(tmp_path):
    (tmp_path / "small.safetensors").write_bytes(b"")
    with pytest.raises(MissingFileError, match="is not a file; from_pretrained loads compressed directories"):
        alds.load(tmp_path, torch.nn.Linear(4, 4))
    with pytest.raises(ArgumentError, match=r"is a file, not a directory; load\(file, model\) loads"):
        alds.from_pretrained(tmp_path / "small.safetensors")


def test_a_loaded_model_is_in_evaluation_mode(tmp_path):
    """Or statistics of BatchNorms would move with the first batch."""
    small = alds.compress(small_net(), params=0.6)
    alds.save(small, tmp_path / "small.safetensors")
    loaded = alds.load(tmp_path / "small.safetensors", lambda: small_net().train())
    assert not any(module.training for module in loaded.modules())
