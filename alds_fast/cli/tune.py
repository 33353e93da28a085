"""``alds-fast tune``: tilings of the fused kernels for a model on this machine's GPU."""

from __future__ import annotations

import argparse
import json
from typing import Any

import torch
from torch import nn

from ..checkpoints import load
from ..deployment import TuningTable, tune
from ..errors import ArgumentError
from ..layers import LowRankLayer
from ..planning import compress
from .arguments import integers, share_or_count
from .targets import model_and_input


def add_tune(commands: Any, parents: list[argparse.ArgumentParser]) -> None:
    """The command's arguments; ``parents`` hold those of the output."""
    parser = commands.add_parser(
        "tune", parents=parents, help="find the fastest tilings of a model's layers on this GPU"
    )
    parser.add_argument(
        "model", metavar="TARGET", help="package.module:function or file.py:function, returns the model"
    )
    parser.add_argument("--weights", metavar="FILE", help="safetensors file with the model's state dict")
    parser.add_argument("--saved", metavar="FILE", help="the compressed model that alds_fast.save wrote, in its place")
    parser.add_argument("--params", type=share_or_count, help="compress it first: share of the parameters to keep")
    parser.add_argument("--input", type=integers, metavar="SHAPE", help="shape of its float32 input: 1,3,224,224")
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), help="of model and input (as they are)")
    parser.add_argument("--device", default="cuda", help="(%(default)s)")
    parser.set_defaults(run=run_tune)


def run_tune(args: argparse.Namespace) -> None:
    """Tune, keep and print."""
    if args.saved is not None and args.params is not None:
        raise ArgumentError("--saved is compressed already: leave out --params")
    model, x = model_and_input(args, None if args.dtype is None else getattr(torch, args.dtype))
    if args.saved is not None:
        model = load(args.saved, model)
    elif args.params is not None:
        model = compress(model, params=args.params)
    _check(model)
    found = tune(model, x)
    print(_json(found) if args.json else found)


def _check(model: nn.Module) -> None:
    if not any(isinstance(module, LowRankLayer) for module in model.modules()):
        raise ArgumentError(
            "the model has no low-rank layer to tune: give --saved FILE, or --params to compress it first"
        )


def _json(found: TuningTable) -> str:
    rows = []
    for row in found.rows:
        tiling = None if row.found.tiling is None else row.found.tiling._asdict()
        rows.append(
            {"layer": row.name, "key": repr(row.key), **row.found._asdict(), "tiling": tiling, "timed": row.timed}
        )
    return json.dumps(rows)
