"""The main job on a real pretrained network: CREPE keeps its quality at half its parameters."""

import os
import subprocess
import sys
from pathlib import Path

import crepe
import pytest
import torch

import alds_fast as alds

pytestmark = pytest.mark.slow

EXAMPLES = Path(crepe.__file__).parent


@pytest.fixture(scope="module")
def full():
    return crepe.full()


def test_the_dense_network_finds_the_pitch(full):
    assert crepe.accuracy(full, *crepe.tones(96, seed=1)) > 0.95


def test_half_of_crepe_keeps_its_quality_within_a_point(full):
    frames, cents = crepe.tones(200, seed=2)
    small = alds.compress(full, params=0.5)
    assert sum(p.numel() for p in small.parameters()) <= 0.5 * sum(p.numel() for p in full.parameters())
    assert crepe.accuracy(small, frames, cents) >= crepe.accuracy(full, frames, cents) - 0.01


def test_demo_script_runs(tmp_path):
    """On the tiny network, to be quick; `make demo` runs the full one."""
    args = "--capacity", "tiny", "--tones", "64", "--rounds", "2", "--out", tmp_path / "out"
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}  # deploy would time the interpreter
    command = [sys.executable, EXAMPLES / "demo.py", *args]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=tmp_path, env=environment)
    assert result.returncode == 0, result.stderr
    assert (
        "loaded model bit-equal to the saved one: True" in result.stdout and "quartiles of the ratios" in result.stdout
    )
    assert (tmp_path / "out" / "spectra.png").stat().st_size > 10_000


def test_tones_are_normalised_and_reproducible():
    frames, cents = crepe.tones(8, seed=3)
    repeated, _ = crepe.tones(8, seed=3)
    assert torch.equal(frames, repeated) and frames.shape == (8, crepe.WINDOW) and bool((cents > 3000).all())
    torch.testing.assert_close(frames.std(1), torch.ones(8))
