"""``alds-fast compress`` and ``show`` of a checkpoint directory."""

from __future__ import annotations

import argparse
import json
import math
from collections import Counter

from ..allocation import BASELINES
from ..checkpoints import PLAN, compress_checkpoint, compressed_layers
from ..criteria import DEFAULT_CRITERION
from ..errors import ArgumentError
from ..text import shape_text, table
from .progress import progress_bars

_MODEL_ONLY = ("weights", "flops", "latency", "input", "data", "sensitivity", "refit", "plot")


def show_layers(folder: str, as_json: bool) -> None:
    """Print what config.json says of a compressed directory without a plan, as ``save_pretrained`` writes it."""
    layers = compressed_layers(folder)
    if as_json:
        print(json.dumps({"layers": layers}))
        return
    names = ("scheme", "groups", "rank", "pivots")
    rows = [[name, shape_text(fields["shape"]), *(str(fields.get(k, "")) for k in names)]
            for name, fields in layers.items()]  # fmt: skip
    print(table(["layer", "shape", *names], rows))
    print(
        f"{len(layers)} low-rank layers; the others, the budget and the errors would be in {PLAN}, which is not there"
    )


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
    same = ("params", "error", "p", "align", "schemes", "include", "exclude", "pivots")
    options = {name: getattr(args, name) for name in same}
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
