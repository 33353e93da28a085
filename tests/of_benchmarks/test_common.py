"""What all benchmarks share: hardware and commit in words, pages with their JSON, turns, memory; and where it lies."""

import json
import subprocess
import sys

import pytest

from benchmarks.common import measure, results

FILES = sorted((results.ROOT / "benchmarks").rglob("*.py"))


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(results.ROOT)))
def test_files_are_short(file):
    assert len(file.read_text().splitlines()) <= 260


def test_an_environment_in_words():
    env = results.environment("abc1234") | {"cpu": "A", "cores": 4, "threads": 1, "omp_wait_policy": "default"}
    versions = f"torch {env['torch']}, Python {env['python']}, commit abc1234"
    assert results.described(env) == f"A, 4 cores, 1 thread, {versions}, OMP_WAIT_POLICY default"
    assert results.described(env | {"device": "B", "threads": 2}).startswith("B, A, 4 cores, 2 threads, ")
    assert results.described(env, timed=False) == f"A, 4 cores, {versions}"


def test_a_page_and_its_json(tmp_path):
    text = results.page("# Head", "", results.table(["", "a"], [["b", 1.5]]))
    assert text == "# Head\n\n|  | a |\n|---|---|\n| b | 1.5 |\n"
    results.save(tmp_path / "new" / "name.json", {"a": 1}, text)
    assert {path.name for path in (tmp_path / "new").iterdir()} == {"name.json", "name.md"}
    assert json.loads((tmp_path / "new" / "name.json").read_text()) == {"a": 1}
    assert (tmp_path / "new" / "name.md").read_text() == text


def test_sides_take_turns():
    calls = []
    medians = measure.take_turns({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, 3)
    assert calls == ["a", "b"] * 3
    assert all(side.keys() == {"wall_s", "cpu_s"} and min(side.values()) >= 0 for side in medians.values())


def test_peak_memory_is_that_of_what_is_held_at_once():
    """64 MB that are freed again before the call ends; in a process whose memory nothing else has used before."""
    code = (
        "import numpy as np; from benchmarks.common.measure import peak_mb; "
        "print(peak_mb(lambda: np.ones(8_000_000).sum()))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=results.ROOT, capture_output=True, text=True, check=True)
    assert 60 < float(done.stdout) < 90
