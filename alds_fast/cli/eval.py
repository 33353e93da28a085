"""``alds-fast eval``: methods x criteria x budgets x seeds on a model with a quality function."""

from __future__ import annotations

import argparse
import inspect
import sys
from collections.abc import Callable
from typing import Any

import torch

from ..criteria import CRITERIA
from ..errors import ArgumentError, EvaluationError
from ..evaluation import evaluate, product
from ..planning import METHODS, analyze
from .targets import ModelTarget, SeededTarget, Target


def _list(kind: Callable[[str], Any]) -> Callable[[str], list[Any]]:
    def read(text: str) -> list[Any]:
        return [kind(part) for part in text.split(",")]

    return read


def add_eval(commands: Any, parents: list[argparse.ArgumentParser], integers: Callable[[str], Any]) -> None:
    """The command's arguments; ``parents`` hold those of the model and of the output."""
    parser = commands.add_parser("eval", parents=parents, help="measure what methods leave of a model's quality")
    parser.add_argument("--quality", required=True, metavar="TARGET", help="function model -> number, higher is better")
    budgets = parser.add_mutually_exclusive_group(required=True)
    budgets.add_argument("--params", type=_list(float), metavar="SHARES", help="of the parameters: 0.5,0.3")
    budgets.add_argument("--flops", type=_list(float), metavar="SHARES", help="of the FLOPs; needs --input")
    parser.add_argument("--methods", type=_list(str), default=["alds"], help=f"out of {','.join(METHODS)}")
    parser.add_argument("--criteria", type=_list(str), default=[None], help=f"out of {','.join(CRITERIA)}")
    parser.add_argument("--p", type=_list(float), default=[None], help="norms over the layers, 1..inf: 4,inf")
    parser.add_argument("--seeds", type=integers, default=(0,), help="0,1,2; for functions with a parameter seed")
    parser.add_argument("--data", metavar="TARGET", help="function that returns batches for the analysis")
    parser.add_argument("--sensitivity", action="store_true", help="with --data, also collect gradients")
    parser.add_argument("--refit", action="store_true", help="with --data, fit layer after layer to it in the end")
    parser.add_argument("--after", metavar="TARGET", help="function model -> model, retraining for example")
    parser.add_argument("--input", type=integers, metavar="SHAPE", help="shape of a float32 input: 1,3,224,224")
    parser.add_argument("--out", metavar="FOLDER", help="results; the same command goes on from there")
    parser.add_argument("--workers", type=int, default=1, help="processes")
    parser.set_defaults(run=run_eval)


def check_data_flags(args: argparse.Namespace) -> None:
    """ArgumentError for a flag that needs --data without it."""
    for flag in ("sensitivity", "refit", "refine"):
        if getattr(args, flag, None) not in (None, False) and not args.data:
            raise ArgumentError(f"--{flag} needs --data, a function that returns batches")


def _variants(args: argparse.Namespace, kind: str, example: Any) -> dict[str, dict[str, Any]]:
    given = {"schemes": tuple(args.schemes), "groups": args.groups, "include": args.include, "exclude": args.exclude}
    usual = {name: parameter.default for name, parameter in inspect.signature(analyze).parameters.items()}
    options = {name: value for name, value in given.items() if value not in (None, usual[name])}
    if args.data:
        options |= {"data": True, "sensitivity": args.sensitivity, "refit": args.refit}
    return product(args.methods, args.criteria, args.p, kind, example, **options)


def run_eval(args: argparse.Namespace) -> None:
    """Run the evaluation and print its table; what is finished is kept if it fails or is interrupted."""
    check_data_flags(args)
    if args.flops and args.input is None:
        raise ArgumentError("--flops needs --input, the shape of an input, for example 1,3,224,224")
    kind = "flops" if args.flops else "params"
    seeded = torch.Generator().manual_seed(0)
    example = None if args.input is None else torch.randn(args.input, generator=seeded, device="cpu")
    variants = _variants(args, kind, example)
    build, quality = ModelTarget(args.target, args.weights), Target(args.quality)
    data, after = (SeededTarget(t) if t else None for t in (args.data, args.after))
    for target in (quality, data, after):
        _ = target and target.function  # refused now, not in every cell
    try:
        table = evaluate(
            build if build.takes_seed else build(), quality, budgets=args.flops or args.params, budget=kind,
            variants=variants, seeds=args.seeds, example_inputs=example, data=data, after=after, out=args.out,
            workers=args.workers,
        )  # fmt: skip
    except EvaluationError as e:
        if e.evaluation is not None:
            _print(e.evaluation, args.json)
        raise
    except KeyboardInterrupt:
        if args.out:
            print(f"alds-fast: what is finished is in {args.out}; the same command goes on from there", file=sys.stderr)
        raise
    _print(table, args.json)


def _print(table: Any, as_json: bool) -> None:
    print(table.to_json() if as_json else table.to_markdown())
