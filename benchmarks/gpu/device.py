"""The device that a GPU benchmark measures: its options, its name, and the files called after it."""

from __future__ import annotations

import argparse
import re
from pathlib import Path

import torch

from benchmarks.common.results import RESULTS


def add_options(parser: argparse.ArgumentParser) -> None:
    """``--device``, ``--quick`` and ``--out``."""
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--quick", action="store_true", help="tiny sizes")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for the results")


def check_options(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Leave with a message if they cannot be met here."""
    if args.device == "cpu" and not args.quick:
        parser.error("--device cpu needs --quick")
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("torch finds no GPU; --quick --device cpu runs without one")


def device_name(device: str) -> str:
    """As the driver calls it; "cpu" for the CPU."""
    return torch.cuda.get_device_name() if device == "cuda" else "cpu"


def results_file(args: argparse.Namespace, kind: str) -> Path:
    """``OUT/KIND_DEVICE.json``, with "_quick" if it is."""
    slug = re.sub(r"[^a-z0-9]+", "_", device_name(args.device).lower()).strip("_")
    return args.out.resolve() / f"{kind}_{slug}{'_quick' if args.quick else ''}.json"
