"""Everything that the launchers can choose compiles for sm_80 and sm_90 within their limits; no GPU is needed."""

import json
import os
import subprocess
import sys

import pytest

from benchmarks.common.results import ROOT
from benchmarks.gpu import aot

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def rows():
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "benchmarks.gpu.aot"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment, timeout=1500)
    assert result.returncode == 0, result.stderr[-2000:]
    return [json.loads(line) for line in result.stdout.splitlines()]


def test_every_configuration_compiles(rows):
    assert len(rows) == len(list(aot.jobs())) and {r["sm"] for r in rows} == {80, 90}


def test_none_spills_or_exceeds_shared_memory_or_registers(rows):
    bad = [
        r for r in rows
        if r["spilled_bytes"] or r["shared_bytes"] > r["shared_limit_bytes"] or r["registers"] * r["warps"] * 32 > 65536
    ]  # fmt: skip
    assert not bad, "\n".join(map(str, bad))
