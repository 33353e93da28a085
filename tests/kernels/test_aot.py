"""Everything that the launchers can choose compiles for sm_80 and sm_90 within their limits; no GPU is needed."""

import pytest

from benchmarks.gpu import aot, sass_table

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def rows():
    return aot.compiled_rows()


def test_every_configuration_compiles(rows):
    assert len(rows) == len(list(aot.jobs())) and {r["sm"] for r in rows} == {80, 90}


def test_none_spills_or_exceeds_shared_memory_or_registers(rows):
    bad = [(row, fault) for row in rows for fault in sass_table.over_limits(row)]
    assert not bad, "\n".join(map(str, bad))
