"""The wheel builds without torch, as on a fresh machine."""

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_wheel_builds_without_torch(tmp_path):
    """In pip's isolated build environment, which has only what pyproject.toml asks for."""
    source = tmp_path / "source"
    listed = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    for name in listed.stdout.splitlines():
        if (ROOT / name).is_file():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_bytes((ROOT / name).read_bytes())
    blocker = "import sys\nsys.modules['torch'] = None\n"  # any import of torch fails during the build
    (source / "setup.py").write_text(blocker + (source / "setup.py").read_text())
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "-w", tmp_path / "dist", source]
    subprocess.run(command, check=True, capture_output=True, timeout=600)
    (wheel,) = (tmp_path / "dist").glob("alds_fast-*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert any(n.startswith("alds_fast/linalg/_core") and n.endswith(".so") for n in names)
    doors = {str(p.relative_to(ROOT)) for p in (ROOT / "alds_fast").rglob("__init__.py")}
    assert {"alds_fast/py.typed", *doors} <= set(names)
    assert not any(n.startswith(("tests", "benchmarks", "examples")) for n in names)
