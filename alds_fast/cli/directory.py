"""``alds-fast compress`` of a checkpoint directory."""

from __future__ import annotations

import argparse
import json
import math
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TaskProgressColumn, TextColumn, TimeElapsedColumn

from ..checkpoints import Progress as ToldOf
from ..checkpoints import compress_checkpoint
from ..errors import ArgumentError

_MODEL_ONLY = ("weights", "flops", "latency", "input", "data", "sensitivity", "refit", "plot")


@contextmanager
def _bars() -> Iterator[ToldOf]:
    """A progress bar for each part of the work on standard error, where that is a terminal."""
    console = Console(stderr=True)
    columns = TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn()
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        tasks: dict[str, TaskID] = {}

        def told(what: str, done: int, total: int) -> None:
            if what not in tasks:
                tasks[what] = progress.add_task(what, total=total)
            progress.update(tasks[what], completed=done)

        yield told


def compress_directory(args: argparse.Namespace, first: bool) -> None:
    """Run it; the ``first`` of several processes prints the result."""
    other = [name for name in _MODEL_ONLY if getattr(args, name)]
    other += ["method"] if args.method != "alds" else []
    if other:
        raise ArgumentError(
            f"--{other[0]} does not go with a checkpoint directory, which is never loaded as a whole; name a function "
            f"that returns the model instead"
        )
    if not 0 < args.max_shard_gb < math.inf:
        raise ArgumentError(f"--max-shard-gb {args.max_shard_gb:g} is not a positive number")
    options = {name: getattr(args, name) for name in ("params", "error", "p", "align", "schemes", "include", "exclude")}
    options |= {"criterion": args.criterion or "frobenius", "groups": args.groups or "auto", "device": args.device}
    options |= {"precision": args.precision or "float32"}
    with _bars() as progress:
        done = compress_checkpoint(
            args.target, args.output, max_shard_bytes=round(args.max_shard_gb * 1e9), progress=progress, **options
        )
    if not first:
        return
    methods = dict(Counter(report.method for report in done.factors.values()))
    if args.json:
        summary = {"output": str(done.folder), "factors": methods, "params": done.plan.params}
        print(json.dumps({**summary, "plan": json.loads(done.plan.to_json())}))
        return
    print(done.plan)
    print(f"factors: {', '.join(f'{n} {m}' for m, n in sorted(methods.items())) or 'none'}")
    print(f"wrote {done.folder}: load it with alds_fast.from_pretrained")
