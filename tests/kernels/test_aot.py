"""Everything that the launchers can choose compiles for sm_80 and sm_90 within their limits; no GPU is needed."""

import pytest

from benchmarks.gpu import aot

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def rows():
    return aot.compiled_rows()


def test_every_configuration_compiles(rows):
    assert len(rows) == len(list(aot.jobs())) and {r["sm"] for r in rows} == {80, 90}


def test_none_spills_or_exceeds_shared_memory_or_registers(rows):
    bad = [
        r for r in rows
        if r["spilled_bytes"] or r["shared_bytes"] > r["shared_limit_bytes"] or r["registers"] * r["warps"] * 32 > 65536
    ]  # fmt: skip
    assert not bad, "\n".join(map(str, bad))
