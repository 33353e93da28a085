"""Where results go, what they are marked with, and their tables."""

from __future__ import annotations

import json
import os
import platform
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import torch

import alds_fast as alds
from alds_fast.files import write_text

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results"


def commit(given: str | None = None) -> str:
    """``given``, or what git says the working tree is; "unknown" without git."""
    if given:
        return given
    command = ["git", "describe", "--always", "--dirty"]
    try:
        described = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return described.stdout.strip() or "unknown"


def cpu_name() -> str:
    """The processor as the kernel calls it."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def environment(given: str | None = None) -> dict[str, object]:
    """Hardware, versions and commit, to stand beside every figure; ``given`` as in :func:`commit`."""
    return {
        "cpu": cpu_name(), "cores": os.cpu_count(), "threads": torch.get_num_threads(),
        "python": platform.python_version(), "torch": torch.__version__, "alds_fast": alds.__version__,
        "commit": commit(given), "omp_wait_policy": os.environ.get("OMP_WAIT_POLICY", "default"),
    }  # fmt: skip


def described(env: Mapping[str, object], timed: bool = True) -> str:
    """An environment in words: with its "device" if it names one, and if ``timed`` with what only times depend on."""
    parts = [env["device"]] if "device" in env else []
    parts += [env["cpu"], f"{env['cores']} cores"]
    parts += [f"{env['threads']} thread" + "s" * (env["threads"] != 1)] if timed else []
    parts += [f"torch {env['torch']}", f"Python {env['python']}", f"commit {env['commit']}"]
    parts += [f"OMP_WAIT_POLICY {env['omp_wait_policy']}"] if timed else []
    return ", ".join(map(str, parts))


def table(headers: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A Markdown table.

    >>> print(table(["a", "b"], [[1, 2]]))
    | a | b |
    |---|---|
    | 1 | 2 |
    """
    return "\n".join([_line(headers), "|" + "---|" * len(headers), *map(_line, rows)])


def _line(cells: Sequence[object]) -> str:
    return "| " + " | ".join(map(str, cells)) + " |"


def page(*parts: str) -> str:
    """A Markdown page of paragraphs and tables; empty ones are left out."""
    return "\n\n".join(filter(None, parts)) + "\n"


def save(file: Path, results: Mapping[str, object], text: str) -> None:
    """``results`` as JSON in the file, and ``text`` beside it as Markdown."""
    file.parent.mkdir(parents=True, exist_ok=True)
    write_text(file, json.dumps(results, indent=1) + "\n")
    write_text(file.with_suffix(".md"), text)


def write(name: str, results: Mapping[str, object], text: str) -> None:
    """``results/NAME.json`` and ``results/NAME.md``; the text is printed too."""
    save(RESULTS / f"{name}.json", results, text)
    print(text)
