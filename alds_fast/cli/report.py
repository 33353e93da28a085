"""``alds-fast report``: a model and its compressed one side by side."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..checkpoints import load
from ..deployment import deploy
from ..evaluation import report
from ..measurement import check_data, first_batch, without_labels
from .arguments import integers
from .targets import ModelTarget, Target


def add_report(commands: Any, parents: list[argparse.ArgumentParser]) -> None:
    """The command's arguments; ``parents`` hold those of the output."""
    parser = commands.add_parser("report", parents=parents, help="size, FLOPs, latency and quality before and after")
    parser.add_argument("target", help="package.module:function or file.py:function that returns the dense model")
    parser.add_argument("small", help="what compress wrote for it, or a function that returns the compressed model")
    parser.add_argument("--weights", metavar="FILE", help="safetensors file with the dense model's state dict")
    inputs = parser.add_mutually_exclusive_group(required=True)
    inputs.add_argument("--input", type=integers, metavar="SHAPE", help="shape of a float32 input: 1,3,224,224")
    inputs.add_argument("--data", metavar="TARGET", help="function that returns batches, of which the first is run")
    parser.add_argument("--quality", metavar="TARGET", help="function model -> number, higher is better")
    parser.add_argument("--deploy", action="store_true", help="also the compressed model in its fastest form here")
    parser.add_argument("--rounds", type=int, default=9, help="turns of every model (%(default)s)")
    parser.add_argument("-o", "--output", metavar="FILE", help="also write it: .md, .json, .png, .pdf or .svg")
    parser.set_defaults(run=run_report)


def run_report(args: argparse.Namespace) -> None:
    """Measure, print and, where asked to, write."""
    quality = Target(args.quality) if args.quality else None
    _ = quality and quality.function  # refused now, not in the end
    dense = ModelTarget(args.target, args.weights)()
    is_function = ":" in args.small and not Path(args.small).is_file()
    small = ModelTarget(args.small)() if is_function else load(args.small, dense)
    inputs = _inputs(args, dense)
    models = {"compressed": small, **({"deployed": deploy(small, inputs)} if args.deploy else {})}
    seen = report(dense, models, inputs, evaluate=quality, rounds=args.rounds)
    print(seen.to_json() if args.json else seen)
    if args.output:
        seen.save(args.output)


def _inputs(args: argparse.Namespace, dense: nn.Module) -> Any:
    if args.input is not None:
        return torch.randn(args.input, generator=torch.Generator().manual_seed(0), device="cpu")
    batches = Target(args.data).batches()
    check_data(batches)
    return first_batch(dense, without_labels(dense, batches))[0]
