"""Memory and time of checkpoint directories compressed with data, stage by stage, for checkpoints of several sizes.

``python -m benchmarks.cpu.large_with_data --blocks 31 62`` writes benchmarks/results/large_with_data.json and .md.
Checkpoints are those of :mod:`benchmarks.cpu.large`, Llama-shaped, bfloat16, random; so are the data's tokens: memory
does not depend on what they say. A stage's peak is the largest resident set (VmHWM) while its parts were at work,
weights that are mapped from files among it. ``--until STAGE`` ends a job after that stage. Each job is a process of
its own, on one thread. Jobs of other sizes and options that the results have stay there, each with its commit.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from benchmarks.common.measure import resident_mb
from benchmarks.common.results import RESULTS, described, environment, page, table, write

from .large import KEEP, VOCABULARY, make_checkpoint


class _Ended(Exception):
    """The last stage that was asked for is over."""


class Stages:
    """Told of progress, once a part of a stage is done: what all the parts of each stage took."""

    def __init__(self, until: str | None) -> None:
        self.until, self.rows = until, {}
        self._begin()

    def _begin(self) -> None:
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
        self.wall, self.cpu = time.perf_counter(), time.process_time()

    def __call__(self, stage: str, done: int, total: int) -> None:
        row = self.rows.setdefault(stage, {"stage": stage, "wall_s": 0.0, "cpu_s": 0.0, "peak_mb": 0.0})
        row["wall_s"] += time.perf_counter() - self.wall
        row["cpu_s"] += time.process_time() - self.cpu
        row["peak_mb"] = max(row["peak_mb"], resident_mb("VmHWM"))
        if done == total:
            print(row, file=sys.stderr, flush=True)
            if stage == self.until:
                raise _Ended
        self._begin()


def worker(source: str, options: dict[str, Any]) -> None:
    """One job; its stages on standard output."""
    import torch

    import alds_fast as alds

    torch.set_num_threads(1)
    torch.manual_seed(0)
    batches = [{"input_ids": torch.randint(VOCABULARY, (1, options["length"]))} for _ in range(options["count"])]
    stages = Stages(options["until"])
    kinds = {key: True for key in ("sensitivity", "refit") if options[key]}
    with suppress(_Ended):
        alds.compress_checkpoint(
            source, Path(source).parent / "out", params=KEEP, data=batches, progress=stages, **kinds
        )
    print(json.dumps(list(stages.rows.values())))


def measured(source: Path, options: dict[str, Any]) -> list[dict[str, Any]]:
    """What the stages of a job took, in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.cpu.large_with_data", "--worker", str(source), json.dumps(options)]
    run = subprocess.run(
        command, check=True, stdout=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    shutil.rmtree(source.parent / "out")
    return json.loads(run.stdout.splitlines()[-1])


def markdown(results: dict[str, Any]) -> str:
    """The results as Markdown."""
    rows = []
    for job in results["jobs"]:
        tokens = f"{job['count']} x {job['length']}"
        for stage in job["stages"]:
            kinds = " + ".join(["data", *(kind for kind in ("sensitivity", "refit") if job[kind])])
            figures = f"{stage['wall_s']:.0f}", f"{stage['cpu_s']:.0f}", f"{stage['peak_mb'] / 1e3:.2f}"
            rows.append([job["blocks"], f"{job['gb']:.2f}", tokens, kinds, job["commit"], stage["stage"], *figures])
    return page(
        f"{described(results['environment'])}; `python -m benchmarks.cpu.large_with_data`",
        f"Llama-shaped checkpoints, bfloat16, {KEEP:.0%} of the parameters kept, one thread:",
        table(["blocks", "GB", "tokens", "with", "commit", "stage", "wall s", "CPU s", "peak GB"], rows),
    )


def main() -> None:
    if sys.argv[1:2] == ["--worker"]:
        return worker(sys.argv[2], json.loads(sys.argv[3]))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--blocks", type=int, nargs="*", default=[31, 62], help="of the checkpoints: 31 are 3 GB")
    parser.add_argument("--count", type=int, default=2, help="sequences of data")
    parser.add_argument("--length", type=int, default=256, help="tokens of each")
    parser.add_argument("--sensitivity", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--refit", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--until", help="the last stage, as progress calls it")
    args = parser.parse_args()
    options = {key: value for key, value in vars(args).items() if key != "blocks"}
    file = RESULTS / "large_with_data.json"
    jobs: list[dict[str, Any]] = json.loads(file.read_text())["jobs"] if file.exists() else []
    results: dict[str, Any] = {"environment": environment()}
    for blocks in args.blocks:
        with tempfile.TemporaryDirectory() as root:
            size = make_checkpoint(Path(root) / "model", blocks)
            stages = measured(Path(root) / "model", options)
            asked = {"blocks": blocks, **options}
            jobs = [job for job in jobs if any(job[key] != value for key, value in asked.items())]
            commit = results["environment"]["commit"]
            jobs.append({"gb": size / 1e9, **asked, "commit": commit, "stages": stages})
    results["jobs"] = jobs
    write("large_with_data", results, markdown(results))


if __name__ == "__main__":
    main()
