"""What importing the package loads, each in a fresh process.

torch.utils.flop_counter, where the operators register their FLOPs, imports triton by itself: it counts as torch.
"""

import subprocess
import sys

import pytest

HEAVY = ("torch._dynamo", "torch.export", "numba", "scipy", "triton", "transformers", "matplotlib", "rich")
REPORT = f"print([name for name in {HEAVY} if name in set(sys.modules) - before])"


def loaded(statement):
    """The heavy packages that the statement loads beyond what torch itself does."""
    code = f"import sys, torch.utils.flop_counter; before = set(sys.modules); {statement}; {REPORT}"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


@pytest.mark.parametrize("statement", ["import alds_fast", "import alds_fast.kernels"])
def test_import_loads_nothing_heavy(statement):
    assert loaded(statement) == "[]"


def test_a_heavy_import_is_seen():
    assert loaded("import alds_fast, rich") == "['rich']"
