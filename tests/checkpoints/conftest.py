"""A checkpoint directory that is compressed once a module."""

import shutil

import pytest
from support import checkpoints
from support.checkpoints import OPTIONS

import alds_fast as alds


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    """A checkpoint directory, and what it gives."""
    folder = tmp_path_factory.mktemp("llama")
    checkpoints.make("llama", folder / "dense")
    alds.compress_checkpoint(folder / "dense", folder / "small", **OPTIONS)
    return folder


@pytest.fixture
def copied(llama, tmp_path):
    """A copy of the checkpoint that may be damaged."""
    shutil.copytree(llama / "dense", tmp_path / "dense")
    return tmp_path / "dense"
