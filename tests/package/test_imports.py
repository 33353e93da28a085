"""What importing the package, and commands that need little, load: each in a fresh process."""

import subprocess
import sys

import pytest
import torch
from support.marks import slow

import alds_fast as alds

HEAVY = ("torch._dynamo", "torch.export", "numba", "scipy", "triton", "transformers", "peft", "matplotlib", "rich")
REPORT = f"print([name for name in {HEAVY} if name in set(sys.modules) - before])"


def loaded(statement):
    """The heavy packages that the statement loads beyond what torch itself does."""
    code = f"import sys, torch; before = set(sys.modules)\n{statement}\n{REPORT}"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


@pytest.mark.parametrize("statement", ["import alds_fast", slow("import alds_fast.kernels")])
def test_import_loads_nothing_heavy(statement):
    assert loaded(statement) == "[]"


@pytest.mark.slow
@pytest.mark.parametrize("arguments", [["--help"], ["show", "PLAN"], ["show", "PLAN", "--json"]])
def test_commands_that_need_little_load_nothing_heavy(arguments, tmp_path):
    plan = tmp_path / "plan.json"
    plan.write_text(alds.analyze(torch.nn.Linear(32, 32)).plan(params=0.5).to_json())
    argv = [str(plan) if a == "PLAN" else a for a in arguments]
    run = f"""
import contextlib, io, alds_fast.cli
with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.suppress(SystemExit):
    alds_fast.cli.main({argv!r})
assert len(out.getvalue()) > 100, out.getvalue()"""
    assert loaded(run) == "[]"


@pytest.mark.slow
@pytest.mark.parametrize("first", ["import alds_fast", "import torch.utils.flop_counter"])
def test_operators_count_their_flops_whichever_is_imported_first(first):
    count = """
import torch, alds_fast.kernels
from torch.utils.flop_counter import FlopCounterMode
with FlopCounterMode(display=False) as counter, torch.device("meta"):
    torch.ops.alds_fast.lowrank_linear(torch.empty(3, 8), torch.empty(2, 8), torch.empty(4, 2), None, None, 1, None)
print(counter.get_total_flops())"""
    result = subprocess.run([sys.executable, "-c", first + count], capture_output=True, text=True, timeout=120)
    assert result.stdout.strip() == str(2 * 3 * (2 * 8 + 4 * 2)), result.stderr


@pytest.mark.slow
def test_a_heavy_import_is_seen():
    assert loaded("import alds_fast, rich") == "['rich']"
