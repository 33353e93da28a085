"""Everything that the launchers can choose compiles for sm_80 and sm_90 within their limits; no GPU is needed.

Of what the table has of the same kernels and Triton, one in sixteen is compiled again.
"""

import json

import pytest
import triton

from benchmarks.common.results import RESULTS
from benchmarks.gpu import aot, sass_table
from benchmarks.gpu.aot_table import of_triton

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def table():
    file = RESULTS / f"{of_triton('aot')}.json"
    return file if file.exists() else None


@pytest.fixture(scope="module")
def rows(table):
    return aot.compiled_rows("benchmarks.gpu.aot", *(("--known", str(table)) if table else ()))


def test_every_configuration_compiles(rows):
    assert len(rows) == len(list(aot.jobs())) and {r["sm"] for r in rows} == {80, 90}


def test_none_spills_or_exceeds_shared_memory_or_registers(rows):
    bad = [(row, fault) for row in rows for fault in sass_table.over_limits(row)]
    assert not bad, "\n".join(map(str, bad))


def test_the_table_has_what_is_compiled(rows, table):
    stored = json.loads(table.read_text()) if table else pytest.skip(f"there is no {of_triton('aot')}.json")
    if triton.__version__ != stored["environment"]["triton"]:
        pytest.skip(f"{table.name} was made by Triton {stored['environment']['triton']}, this is {triton.__version__}")
    in_table = {row["key"]: row for row in stored["rows"]}
    other = [row for row in rows if in_table.get(row["key"]) != row]
    assert not other, f"{len(other)} rows; if that is meant: python -m benchmarks.gpu.aot_table\n{other[0]}"
