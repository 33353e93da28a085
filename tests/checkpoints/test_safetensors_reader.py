"""Tensors are read and written as safetensors itself has them."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from alds_fast.checkpoints import Entry, write_shard
from alds_fast.checkpoints.safetensors_reader import CODES, SINGLE, open_shards, stored_in
from alds_fast.errors import ArgumentError, FileFormatError, FileWriteError
from alds_fast.files import write_whole

TENSORS = {
    "scalar": torch.tensor(3.5),
    "empty": torch.zeros(0, 4),
    "flags": torch.tensor([True, False, True]),
    "half": torch.randn(3, 5).half(),
    "brain": torch.randn(2, 3, 4).bfloat16(),
    "long": torch.arange(7),
    "double": torch.randn(4, 4).double(),
}


@pytest.fixture
def folder(tmp_path):
    save_file(TENSORS, tmp_path / SINGLE)
    (tmp_path / "config.json").write_text("{}")
    return tmp_path


def test_reads_what_safetensors_writes(folder):
    shards = open_shards(folder)
    assert shards.tensors.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        stored = shards.tensors[name]
        loaded = stored.tensor()
        assert loaded.dtype == tensor.dtype and torch.equal(loaded, tensor) and loaded.shape == tensor.shape
        assert b"".join(stored.chunks()) == tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes()


def test_writes_what_safetensors_reads(tmp_path):
    entries = [Entry(n, CODES[t.dtype], tuple(t.shape), t.nbytes) for n, t in TENSORS.items()]

    def content(entry):
        data = TENSORS[entry.name].view(-1).view(torch.uint8).numpy().tobytes()
        return [data[:3], data[3:]]

    write_shard(tmp_path / "out.safetensors", entries, content)
    loaded = load_file(tmp_path / "out.safetensors")
    assert loaded.keys() == TENSORS.keys() and all(torch.equal(loaded[n], t) for n, t in TENSORS.items())
    assert [p.name for p in tmp_path.iterdir()] == ["out.safetensors"]
    assert list(stored_in(tmp_path / "out.safetensors")) == list(TENSORS)


def test_a_write_that_fails_leaves_what_was_there(tmp_path):
    path = tmp_path / "file"
    path.write_text("old")

    def pieces():
        yield b"new"
        raise OSError(28, "No space left on device")

    with pytest.raises(FileWriteError, match="No space left on device.*free some space and run the same command"):
        write_whole(path, pieces())
    assert path.read_text() == "old" and [p.name for p in tmp_path.iterdir()] == ["file"]


def test_types_that_torch_does_not_have(folder):
    header = {"odd": {"dtype": "F8_E8M0", "shape": [4], "data_offsets": [0, 4]}}
    raw = json.dumps(header).encode()
    (folder / SINGLE).write_bytes(len(raw).to_bytes(8, "little") + raw + b"abcd")
    stored = open_shards(folder).tensors["odd"]
    assert list(stored.chunks()) == [b"abcd"]
    with pytest.raises(ArgumentError, match="type F8_E8M0 cannot be decomposed"):
        stored.tensor()


def test_a_file_that_shrinks_while_it_is_read(folder):
    stored = open_shards(folder).tensors["double"]
    with open(folder / SINGLE, "r+b") as file:
        file.truncate(stored.start + 8)
    for read in (stored.tensor, lambda: list(stored.chunks())):
        with pytest.raises(FileFormatError, match="ends in the middle of a tensor"):
            read()
