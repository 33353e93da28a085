"""``alds-fast compress`` of a checkpoint directory."""

from __future__ import annotations

import argparse
import json
import math
from collections import Counter

from ..allocation import BASELINES
from ..checkpoints import compress_checkpoint
from ..criteria import DEFAULT_CRITERION
from ..errors import ArgumentError
from .progress import progress_bars

_MODEL_ONLY = ("weights", "flops", "latency", "input", "data", "sensitivity", "refit", "plot")


def compress_directory(args: argparse.Namespace, first: bool) -> None:
    """Run it; the ``first`` of several processes prints the result."""
    other = [name for name in _MODEL_ONLY if getattr(args, name)]
    other += ["method"] if args.method in BASELINES else []
    if other:
        raise ArgumentError(
            f"--{other[0]} does not go with a checkpoint directory, which is never loaded as a whole; name a function "
            f"that returns the model instead"
        )
    if not 0 < args.max_shard_gb < math.inf:
        raise ArgumentError(f"--max-shard-gb {args.max_shard_gb:g} is not a positive number")
    options = {name: getattr(args, name) for name in ("params", "error", "p", "align", "schemes", "include", "exclude")}
    options |= {
        "criterion": args.criterion or DEFAULT_CRITERION,
        "groups": args.groups or "auto",
        "device": args.device,
    }
    options |= {"precision": args.precision or "float32"}
    with progress_bars() as progress:
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
