"""Everything that the launchers can choose compiles for sm_80 and sm_90 within their limits; no GPU is needed.

Of what aot.json has of the same kernels and Triton, one in eight is compiled again.
"""

import json

import pytest

from benchmarks.common.results import RESULTS
from benchmarks.gpu import aot, sass_table

pytestmark = pytest.mark.slow

TABLE = RESULTS / "aot.json"


@pytest.fixture(scope="module")
def rows():
    return aot.compiled_rows("benchmarks.gpu.aot", "--known", str(TABLE))


@pytest.fixture(scope="module")
def stored():
    return json.loads(TABLE.read_text())


def test_every_configuration_compiles(rows):
    assert len(rows) == len(list(aot.jobs())) and {r["sm"] for r in rows} == {80, 90}


def test_none_spills_or_exceeds_shared_memory_or_registers(rows):
    bad = [(row, fault) for row in rows for fault in sass_table.over_limits(row)]
    assert not bad, "\n".join(map(str, bad))


def test_the_table_has_what_is_compiled(rows, stored):
    triton = pytest.importorskip("triton")
    if triton.__version__ != stored["environment"]["triton"]:
        pytest.skip(f"aot.json was made by Triton {stored['environment']['triton']}, this is {triton.__version__}")
    in_table = {row["key"]: row for row in stored["rows"]}
    other = [row for row in rows if in_table.get(row["key"]) != row]
    assert not other, f"{len(other)} rows; if that is meant: python -m benchmarks.gpu.aot_table\n{other[0]}"
