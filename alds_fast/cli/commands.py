"""Command line: ``alds-fast analyze | bench | compress | eval | report | show``.

Exit codes: 0 done, 1 refused or failed, 2 wrong usage, 130 interrupted.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections import Counter
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..allocation import SHARES
from ..checkpoints import model_file, plan_of_directory, read_header, save
from ..criteria import CRITERIA
from ..errors import AldsError, ArgumentError, FileFormatError, MissingFileError
from ..factors import PASSES
from ..linalg import SCHEMES
from ..measurement import check_batches
from ..planning import (
    METHODS,
    Analysis,
    Plan,
    analysis_dict,
    analyze,
    check_plot,
    check_refinement,
    kinds_text,
    plot_plan,
    resolved_precision,
    smallest_of_quality,
)
from ..progress import Progress, telling
from ..version import __version__
from .arguments import amount, as_pins, group_counts, integers, passes, pin, share_or_count
from .bench import add_bench
from .directory import compress_directory, show_layers
from .eval import add_eval, check_data_flags
from .report import add_report
from .targets import TARGET_HELP, ModelTarget, Target
from .tune import add_tune

BUDGETS = (*SHARES, "error", "quality")


def _precision(args: argparse.Namespace) -> str:
    """Of the spectra: as asked for, or float32 where only a plan that can be checked is made of them."""
    if args.command != "compress":
        return "float64"
    if args.precision is not None or args.data or args.plot:
        return args.precision or "float64"
    return resolved_precision({name: getattr(args, name) for name in SHARES}, args.criterion, args.method)


def _analyze(args: argparse.Namespace, model: nn.Module, progress: Progress, **data: Any) -> Analysis:
    return analyze(
        model, schemes=args.schemes, groups=args.groups or "divisors", include=args.include, exclude=args.exclude,
        precision=_precision(args), progress=progress, **data,
    )  # fmt: skip


def _run_analyze(args: argparse.Namespace) -> None:
    with telling(None) as progress:
        analysis = _analyze(args, ModelTarget(args.target, args.weights)(), progress)
    print(json.dumps(analysis_dict(analysis)) if args.json else analysis)


def _run_compress(args: argparse.Namespace) -> None:
    if ":" not in args.target and not Path(args.target).is_dir():
        raise MissingFileError(
            f"{args.target!r}: there is no such checkpoint directory (huggingface_hub.snapshot_download gets one by "
            f"name), and a function that returns the model is named package.module:function or file.py:function"
        )
    if Path(args.target).is_dir():
        compress_directory(args, first=os.environ.get("RANK", "0") == "0")
        return
    if args.device != "cpu":
        raise ArgumentError(
            "--device goes with a checkpoint directory; a model is worked on where its function puts it"
        )
    model_file(args.output)
    if args.plot:
        check_plot(args.plot)
    if (args.flops is not None or args.latency is not None) and args.input is None:
        raise ArgumentError("--flops and --latency need --input, the shape of an input, for example 1,3,224,224")
    if (args.quality is None) != (args.evaluate is None):
        raise ArgumentError("--quality and --evaluate go together: the least that the function of a model may return")
    if args.also:
        raise ArgumentError("--also goes with a checkpoint directory and a text as --data")
    check_data_flags(args)
    batches = Target(args.data).batches() if args.data else None
    if args.refit or args.refine:
        check_batches(batches, "the result of --data")
    begin = time.perf_counter()
    model = ModelTarget(args.target, args.weights)()
    if args.refine:
        check_refinement(model, batches, args.refine, args.include, args.exclude, args.blocks)
    with telling(None) as progress:
        example = None if args.input is None else torch.randn(args.input, device="cpu")
        seeing = {"data": batches, "sensitivity": args.sensitivity, "example_inputs": example}
        analysis = _analyze(args, model, progress, **seeing)
        same = "criterion", "p", "method", "align", "pivots", "min_rank", "hidden_units"
        options = {name: getattr(args, name) for name in same}
        plans = partial(analysis.plan, **options, pins=as_pins(args.pin), example_inputs=example)
        fitting: dict[str, Any] = {"refit": batches if args.refit else None, "refine": batches if args.refine else None}
        apply: Any = partial(
            Plan.apply, **fitting, epochs=args.refine or PASSES, example_inputs=example, blocks=args.blocks
        )
        if args.quality is None:
            plan = plans(**{name: getattr(args, name) for name in BUDGETS}, progress=progress)
            small = apply(plan, model, progress=progress)
        else:
            plan, small = smallest_of_quality(model, plans, apply, Target(args.evaluate), args.quality, progress)
    save(small, args.output)
    if args.plot:
        plot_plan(analysis, plan, args.plot)
    seconds, size = time.perf_counter() - begin, Path(args.output).stat().st_size
    factors: dict[str, Any] = getattr(small, "alds_factors", {})
    methods = dict(Counter(r.method for r in factors.values()))
    if args.json:
        summary = {"output": args.output, "file_bytes": size, "seconds": seconds, "factors": methods}
        print(json.dumps({**summary, "params": plan.params, "plan": json.loads(plan.to_json())}))
        return
    print(plan)
    print(f"factors: {', '.join(f'{n} {m}' for m, n in sorted(methods.items())) or 'none'}")
    print(f"wrote {args.output}: {size:,} bytes, in {seconds:.1f} s")


def _run_show(args: argparse.Namespace) -> None:
    path, plan = Path(args.file), None
    if path.is_dir():
        plan = plan_of_directory(args.file)
        if plan is None:
            show_layers(args.file, args.json)
            return
    elif path.suffix == ".json" and path.is_file():
        try:
            plan = Plan.from_json(path.read_text())
        except UnicodeDecodeError as e:
            raise FileFormatError(f"{args.file!r} is not a text file") from e
    else:
        plan = read_header(path)["plan"]
    if plan is None:
        raise FileFormatError(f"{args.file!r} holds a compressed model without a plan")
    print(plan.to_json() if args.json else f"{plan}\n\n{kinds_text(plan.layers)}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("alds-fast", description="Low-rank compression of PyTorch models.")
    parser.add_argument("--version", action="version", version=f"alds_fast {__version__}")
    commands = parser.add_subparsers(dest="command")
    model = argparse.ArgumentParser(add_help=False)
    model.add_argument("target", help=TARGET_HELP)
    model.add_argument("--weights", metavar="FILE", help="safetensors file with the model's state dict")
    model.add_argument("--schemes", type=integers, default=SCHEMES, help="folds to try, for example 0,3")
    model.add_argument(
        "--groups",
        type=group_counts,
        help="channel slices to try: divisors (default), or 1,2,4; "
        "for a checkpoint directory divisors up to 16 (default)",
    )
    model.add_argument("--include", action="append", metavar="PATTERN", help="only these layers (may be repeated)")
    model.add_argument("--exclude", action="append", metavar="PATTERN", help="not these layers (may be repeated)")
    output = argparse.ArgumentParser(add_help=False)
    output.add_argument("--json", action="store_true", help="print JSON")
    listing = commands.add_parser("analyze", parents=[model, output], help="list the layers and what can be done")
    listing.set_defaults(run=_run_analyze)
    compress = commands.add_parser("compress", parents=[model, output], help="compress a model and save it")
    compress.add_argument("--params", type=share_or_count, help="share of the parameters, in (0, 1], or their number")
    compress.add_argument("--flops", type=share_or_count, help="share of the FLOPs, or their number; needs --input")
    compress.add_argument(
        "--memory", type=amount, help="share of the bytes of weights (with --input of activations too), or like 20MB"
    )
    compress.add_argument("--latency", type=float, help="share of the measured latency, in (0, 1]; needs --input")
    compress.add_argument("--error", type=float, help="largest relative error of a layer, in the place of the above")
    compress.add_argument("--quality", type=float, help="least that --evaluate may return, in the place of the above")
    compress.add_argument("--evaluate", metavar="TARGET", help="function model -> number, higher is better")
    compress.add_argument("--input", type=integers, metavar="SHAPE", help="shape of a float32 input, 1,3,224,224")
    compress.add_argument(
        "-o", "--output", required=True, metavar="PATH", help="file, or for a directory new directory, to write"
    )
    compress.add_argument(
        "--data", metavar="TARGET", help="function that returns batches of the model's inputs; "
        "for a checkpoint directory also a text, a .jsonl of texts, or a .safetensors of input_ids",
    )  # fmt: skip
    compress.add_argument("--tokens", type=int, default=32768, help="of a text, to calibrate on (%(default)s)")
    compress.add_argument("--sequence", type=int, default=512, help="tokens of a window of a text (%(default)s)")
    compress.add_argument("--also", metavar="TEXT", help="another text, on which the perplexity is told too")
    compress.add_argument("--sensitivity", action="store_true", help="with --data, also collect gradients")
    compress.add_argument("--refit", action="store_true", help="with --data, fit layer after layer to it in the end")
    compress.add_argument(
        "--refine", type=passes, nargs="?", const=PASSES, metavar="N",
        help=f"with --data, train block after block on it in the end, N passes for each ({PASSES})",
    )  # fmt: skip
    compress.add_argument("--blocks", metavar="LISTS", help="with --data, lists of blocks (model.layers) if not found")
    compress.add_argument("--criterion", choices=CRITERIA, default=None)
    compress.add_argument("--p", type=float, default=None, help="norm over the layers, 1..inf (default by criterion)")
    compress.add_argument("--method", choices=METHODS, default="alds")
    compress.add_argument("--precision", choices=("float32", "float64"), help="of the spectra (default: what will do)")
    compress.add_argument("--align", type=int, default=1, help="ranks are multiples of this")
    compress.add_argument(
        "--pin", type=pin, action="append", metavar="LAYERS=PIN", help="dense, or limits of these layers, joined by "
        "commas: max_rank=64,min_keep=0.5 (may be repeated)",
    )  # fmt: skip
    compress.add_argument(
        "--hidden-units", action="store_true", help="also remove hidden units of MLPs (with --sensitivity)"
    )
    compress.add_argument("--min-rank", type=int, default=1, help="least rank of what does not stay dense")
    compress.add_argument("--no-pivots", dest="pivots", action="store_false", help="plain factors only")
    compress.add_argument("--plot", metavar="FILE", help="also draw spectra and ranks (PNG, PDF, SVG)")
    compress.add_argument(
        "--device", default="cpu", help="for a checkpoint directory: cpu or cuda (with --data a block at a time)"
    )
    compress.add_argument("--max-shard-gb", type=float, default=5.0, help="most GB in a file of a checkpoint directory")
    compress.set_defaults(run=_run_compress)
    add_eval(commands, [model, output], integers)
    add_report(commands, [output])
    add_bench(commands, [output])
    add_tune(commands, [output])
    show = commands.add_parser("show", parents=[output], help="print the plan of a saved model or of a plan file")
    show.add_argument("file", help="a model written by save, a compressed directory, or a plan in JSON")
    show.set_defaults(run=_run_show)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    parser = _parser()
    args = parser.parse_args(argv)
    if args.command is None:
        parser.print_help(sys.stderr)
        return 2
    given = [name for name in BUDGETS if getattr(args, name, None) is not None]
    if args.command == "compress" and (not given or (len(given) > 1 and {"error", "quality"} & {*given})):
        parser.error("give --error or --quality, or one or several of --params, --flops, --memory and --latency")
    try:
        args.run(args)
        sys.stdout.flush()
    except AldsError as e:
        print(f"alds-fast: {e}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("alds-fast: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of our output has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    return 0
