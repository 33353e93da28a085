"""``alds-fast bench``: low-rank layers beside dense ones on this machine."""

from __future__ import annotations

import argparse
import sys
from typing import Any

import torch

from ..bench import Benchmark, benchmark, register
from ..errors import ArgumentError
from ..files import target_file
from .arguments import integers, share_or_count
from .targets import Target, model_and_input

_OPTIONS = (
    *("linear", "conv", "rank", "rows", "image", "batch", "groups", "scheme", "bias", "device"),
    *("params", "flops"),
)
ENDINGS = (".json", ".md", ".png")


def _kernel(text: str) -> tuple[str, Target]:
    name, _, target = text.partition("=")
    if not target:
        raise argparse.ArgumentTypeError(f"{text!r} is not like mine=file.py:function")
    return name, Target(target)


def add_bench(commands: Any, parents: list[argparse.ArgumentParser]) -> None:
    """The command's arguments; ``parents`` hold those of the output."""
    parser = commands.add_parser("bench", parents=parents, help="time low-rank layers beside dense ones here")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--linear", type=integers, metavar="IN,OUT", help="a linear layer: 4096,4096")
    what.add_argument(
        "--conv", type=integers, metavar="IN,OUT,KERNEL", help="a convolution that keeps the size: 64,64,3"
    )
    what.add_argument(
        "--model", metavar="TARGET", help="package.module:function or file.py:function, returns the model"
    )
    parser.add_argument("--rank", type=integers, help="of every channel slice, several one by one: 64,128")
    parser.add_argument("--rows", type=integers, help="rows of --linear's input (1,16,2048)")
    parser.add_argument("--image", type=integers, help="sides of --conv's images (56)")
    parser.add_argument("--batch", type=integers, help="images of --conv (32)")
    parser.add_argument("--groups", type=int, help="channel slices (1)")
    parser.add_argument("--scheme", type=int, help="0: the encoder has --conv's kernel, 3: the decoder has it (0)")
    parser.add_argument("--bias", action="store_true", default=None, help="with a bias")
    parser.add_argument("--weights", metavar="FILE", help="safetensors file with --model's state dict")
    parser.add_argument("--input", type=integers, metavar="SHAPE", help="shape of --model's float32 input: 1,3,224,224")
    parser.add_argument("--params", type=share_or_count, help="share of --model's parameters to keep, or their number")
    parser.add_argument("--flops", type=share_or_count, help="share of its FLOPs, or their number (0.5)")
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), help="(bfloat16 on a GPU, else float32)")
    parser.add_argument("--device", help="cpu or cuda, also of --model (cuda where there is a GPU)")
    parser.add_argument("--rounds", type=int, default=15, help="turns of every way (%(default)s)")
    parser.add_argument("--no-compile", dest="compile", action="store_false", help="without torch.compile")
    parser.add_argument(
        "--kernel", type=_kernel, action="append", default=[], metavar="NAME=TARGET",
        help="a function of yours among the ways, called as lowrank_linear or lowrank_conv2d (may be repeated)",
    )  # fmt: skip
    parser.add_argument("--out", metavar="NAME", help="also write NAME.json, NAME.md and NAME.png")
    parser.set_defaults(run=run_bench)


def run_bench(args: argparse.Namespace) -> None:
    """Measure, print and, where asked to, write."""
    if args.out is not None and args.out.endswith(ENDINGS):
        args.out = args.out.rpartition(".")[0]
    for ending in ENDINGS if args.out is not None else ():
        target_file(f"{args.out}{ending}")  # refused before the work
    for name, target in args.kernel:
        register(name, target.function, "conv" if args.conv else "linear")
    options = {name: getattr(args, name) for name in _OPTIONS}
    options["dtype"] = None if args.dtype is None else getattr(torch, args.dtype)
    if args.model is not None:
        model, x = model_and_input(args, options.pop("dtype"))
        options |= {"model": model, "example_inputs": x, "device": None}
    elif args.weights is not None or args.input is not None:
        raise ArgumentError(f"--{'input' if args.weights is None else 'weights'} goes with --model")
    seen = benchmark(**options, rounds=args.rounds, compile=args.compile)
    print(seen.to_json() if args.json else seen)
    if args.out is not None:
        _write(seen, args.out)


def _write(seen: Benchmark, name: str) -> None:
    """All three files; numbers and table also where the picture cannot be drawn, which is said."""
    for ending in ENDINGS:
        try:
            seen.save(f"{name}{ending}")
        except ArgumentError as e:
            if ending != ENDINGS[-1]:
                raise
            print(f"no picture: {e}", file=sys.stderr)
