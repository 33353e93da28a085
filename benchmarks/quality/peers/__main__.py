"""SmolLM2-135M by others' methods and by ours, at one share of its decoder's linear layers after another.

``python -m benchmarks.quality.peers --also FILE`` appends one line per method and share to ``results.jsonl`` in
``--out``, and writes table and picture to ``--page``, benchmarks/results/quality. Started again it goes on where it
was. Without ``--also`` models are judged on documents of the Brown corpus alone.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from alds_fast import AldsError
from alds_fast.files import replacing
from benchmarks.common.results import RESULTS, environment

from ..data import Missing
from ..language import needs
from .layers import share_left
from .methods import METHODS, STATISTICS
from .setting import Setting, smollm2_setting
from .table import write_results

SHARES = (0.8, 0.6, 0.9, 0.4)  # in the order of work


class Run:
    """One process of it: statistics are kept in memory for all shares."""

    def __init__(self, setting: Setting, out: Path) -> None:
        self.setting, self.out, self.file = setting, out, out / "results.jsonl"
        out.mkdir(parents=True, exist_ok=True)
        self.digest = setting.digest()
        self.rows = [json.loads(line) for line in self.file.read_text().splitlines()] if self.file.exists() else []
        if any(row["data"] != self.digest for row in self.rows):
            raise AldsError(f"{self.file} is of other data or texts; give the same --also as then, or another --out")
        self._statistics: dict[str, Any] = {}

    def _has(self, **wanted: Any) -> bool:
        return any(all(row.get(key) == value for key, value in wanted.items()) for row in self.rows)

    def _write(self, **row: Any) -> None:
        row |= {"data": self.digest, "environment": environment()}
        self.rows.append(row)
        with open(self.file, "a") as opened:
            opened.write(json.dumps(row) + "\n")
        print({key: value for key, value in row.items() if key not in ("data", "environment")}, flush=True)

    def dense(self) -> None:
        """What is compared with."""
        if not self._has(kind="dense"):
            self._write(kind="dense", perplexity=self.setting.judged(self.setting.model))

    def statistics(self, name: str) -> Any:
        """Of calibration data, once for all methods that need them."""
        if name not in self._statistics:
            began = time.process_time()
            self._statistics[name] = STATISTICS[name](self.setting, self.out, self.statistics)
            if not self._has(kind="statistics", name=name):
                self._write(kind="statistics", name=name, seconds=time.process_time() - began)
        return self._statistics[name]

    def model(self, name: str, share: float) -> tuple[nn.Module, float]:
        """A method's model, and the CPU-seconds of it alone: without statistics, without the method before.

        Those that others go on from are kept in the folder.
        """
        method, file = METHODS[name], self.out / f"{name}, {share:g}, {self.digest}.pt"
        if file.exists():
            return torch.load(file, weights_only=False)
        given = [self.statistics(need) for need in method.needs]
        given += [self.model(method.after, share)[0]] if method.after else []
        began = time.process_time()
        made = method.build(self.setting, share, *given), time.process_time() - began
        if any(other.after == name for other in METHODS.values()):
            with replacing(file) as part:
                torch.save(made, part)
        return made

    def cell(self, name: str, share: float) -> None:
        """One method at one share, unless it is there."""
        if self._has(kind="cell", method=name, share=share):
            return
        made, seconds = self.model(name, share)
        left = share_left(made, self.setting.model, self.setting.include)
        self._write(
            kind="cell", method=name, share=share, left=left, seconds=seconds, perplexity=self.setting.judged(made)
        )


def run(setting: Setting, out: Path, shares: Sequence[float], methods: Sequence[str]) -> list[dict[str, Any]]:
    """All cells that are not there yet; all rows."""
    work = Run(setting, out)
    work.dense()
    for share in shares:
        for name in methods:
            work.cell(name, share)
    return work.rows


def ordered(shares: Sequence[float]) -> list[float]:
    """80 and 60 % first, then the others as they are given."""
    return sorted(shares, key=lambda share: SHARES.index(share) if share in SHARES else len(SHARES))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shares", type=float, nargs="*", default=SHARES, help="of the decoder's linear layers")
    parser.add_argument("--methods", nargs="*", default=list(METHODS), choices=list(METHODS), metavar="METHOD")
    parser.add_argument("--also", type=Path, action="append", default=[], help="a text to be judged on, .gz or plain")
    parser.add_argument("--out", type=Path, default=Path("quality_results/peers"))
    parser.add_argument("--page", type=Path, default=RESULTS / "quality", help="folder of the table and the picture")
    args = parser.parse_args()
    torch.set_num_threads(1)
    try:
        needs()
        if not args.also:
            print("without --also FILE models are judged on the Brown corpus alone", flush=True)
        rows = run(smollm2_setting(args.also), args.out, ordered(args.shares), args.methods)
    except (AldsError, Missing) as error:
        raise SystemExit(f"{error}") from error
    write_results(rows, args.page)


if __name__ == "__main__":
    main()
