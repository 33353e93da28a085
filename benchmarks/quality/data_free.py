"""Plans without data: the default, other norms and criteria, the paper's search; a rank-one correction or none.

``python -m benchmarks.quality.data_free --data FOLDER`` runs the suite's networks and those of
:mod:`benchmarks.quality.more_networks`: ResNet-20 for CIFAR-10, whose weights, ``resnet20_cifar10.safetensors``, no
package ships (without ``--data`` it is left out, and that is said), and ResNet-18s that are trained here. Cells are
lines of ``data_free.jsonl`` in ``--out``; started again, the command goes on. Then it writes
benchmarks/results/quality/data_free.md.

"constants": convolutions keep what they return for a constant input (``Plan.keeps_constants``).
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

import alds_fast as alds
from alds_fast.factors import factorize
from benchmarks.common.results import RESULTS, described, environment, page, table

from .language import LanguageTask
from .more_networks import IMAGES, more_networks
from .networks import NETWORKS, Network

WINDOWS = 8  # of SmolLM2's 80
DEFAULT, BEFORE, SEARCH = "p=4, constants", "p=4", "paper's search"
FEW = BEFORE, DEFAULT, SEARCH
SHARES = {"minilm": (0.8, 0.6, 0.5), "smollm2": (0.9, 0.8, 0.5)}
Cell = tuple[str, str, str]  # network, budget, variant


def variants() -> dict[str, tuple[dict[str, Any], bool]]:
    """Options of a plan by name, and whether convolutions keep constants."""
    plans: dict[str, tuple[dict[str, Any], bool]] = {}
    for p in (2.0, 4.0, 8.0, math.inf):
        for constants in (False, True):
            plans[f"p={p:g}" + ", constants" * constants] = {"p": p}, constants
    plans["operator, p=4"] = {"criterion": "operator"}, False
    search = {"method": "alds-heuristic", "criterion": "reference"}
    plans |= {SEARCH: (search, False), f"{SEARCH}, constants": (search, True), "l-rank": ({"method": "l-rank"}, False)}
    return plans


def networks(folder: Path | None) -> dict[str, Network]:
    """Those that take minutes, by name; ``folder`` has the weights that no package ships."""
    every = NETWORKS | more_networks(folder)
    del every["crepe-full"]
    return every


def quality_of(network: Network) -> Callable[[nn.Module], float]:
    """Its quality; of the language model on fewer windows."""
    return LanguageTask(WINDOWS).quality if network.name == "smollm2" else network.quality


def budgets_of(network: Network, model: nn.Module) -> dict[str, dict[str, Any]]:
    """By name, as options of plan. Of what is not a classifier by parts of what may be compressed."""
    if network.name in SHARES:
        return {f"params {s:g}": {"params": network.share(model, s)} for s in SHARES[network.name]}
    shares = {"params .5": {"params": 0.5}, "FLOPs .5": {"flops": 0.5}, "params .3": {"params": 0.3}}
    return shares | {"FLOPs .6": {"flops": 0.6}}


def wanted(budget: str, patterns: Sequence[str]) -> list[str]:
    """The variants that match a pattern at one half; three of all elsewhere."""
    names = variants() if budget.endswith(".5") else FEW
    return [name for name in names if any(fnmatch.fnmatch(name, pattern) for pattern in patterns)]


def run(
    network: Network, known: dict[Cell, float], keep: Callable[[Cell, float], None], patterns: Sequence[str] = ("*",)
) -> None:
    """The cells of a network that are not known yet, of variants that match a pattern."""
    model, quality = network.build(0), quality_of(network)
    if (cell := (network.name, "", "dense")) not in known:
        keep(cell, quality(model))
    analysis = alds.analyze(model, include=network.include, progress=False)
    for budget, share in budgets_of(network, model).items():
        for name in wanted(budget, patterns):
            if (cell := (network.name, budget, name)) in known:
                continue
            options, constants = variants()[name]
            plan = analysis.plan(**share, **options, example_inputs=network.example_inputs)
            chosen = [row.choice for row in plan.layers if row.choice]
            twin = cell[0], budget, name.removesuffix(", constants")
            linear = all(not choice.shape.kernel for choice in chosen)
            if constants and linear and twin in known:
                keep(cell, known[twin])  # there is nothing to correct
                continue
            small, _ = factorize(model, chosen, plan.spectra, exact=plan.exact, constants=constants)
            keep(cell, quality(small))


def tables(cells: dict[Cell, float], names: list[str]) -> list[str]:
    """Per budget, networks by variants."""
    parts = []
    for budget in dict.fromkeys(budget for _, budget, _ in cells if budget):
        here = [name for name in names if any(cell[:2] == (name, budget) for cell in cells)]
        columns = [v for v in variants() if any(cell[1:] == (budget, v) for cell in cells)]
        rows = []
        for name in here:
            values = [cells.get((name, budget, v)) for v in columns]
            best = max(v for v in values if v is not None)
            texts = ["-" if v is None else f"**{v:.3f}**" if v >= best - 0.002 else f"{v:.3f}" for v in values]
            rows.append([name, f"{cells[name, '', 'dense']:.3f}", *texts])
        parts += [f"## {budget}", table(["network", "dense", *columns], rows)]
    return parts


def summary(cells: dict[Cell, float]) -> str:
    """How the default differs from the one before, and from the paper's search."""
    lines = []
    for other in (BEFORE, SEARCH):
        pairs = [
            (q - cells[n, b, other], n, b) for (n, b, v), q in cells.items() if v == DEFAULT and (n, b, other) in cells
        ]
        better, worse = sum(d > 0.002 for d, *_ in pairs), sum(d < -0.002 for d, *_ in pairs)
        (low, *at), (high, *there) = min(pairs), max(pairs)
        lines.append(
            f"- against {other!r}: better by more than .002 in {better} of {len(pairs)} cells, worse in {worse}; from "
            f"{low:+.4f} ({', '.join(at)}) to {high:+.4f} ({', '.join(there)})"
        )
    return f"The default, {DEFAULT!r},\n\n" + "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder with resnet20_cifar10.safetensors")
    parser.add_argument("--out", type=Path, default=Path("quality_results"))
    parser.add_argument("--only", nargs="*", help="names of networks; by default all")
    parser.add_argument("--variants", nargs="*", default=["*"], help="shell-style patterns; by default all")
    parser.add_argument("--commit", help="that made the results; the present one by default")
    args = parser.parse_args()
    torch.set_num_threads(1)
    args.out.mkdir(parents=True, exist_ok=True)
    file, every = args.out / "data_free.jsonl", networks(args.data)
    lines = map(json.loads, file.read_text().splitlines() if file.exists() else ())
    known: dict[Cell, float] = {tuple(line["cell"]): line["quality"] for line in lines}

    def keep(cell: Cell, quality: float) -> None:
        known[cell] = quality
        with open(file, "a") as opened:
            opened.write(json.dumps({"cell": cell, "quality": quality}) + "\n")
        print(*cell, f"{quality:.4f}", flush=True)

    missing = []
    for name in args.only or every:
        if (reason := every[name].missing()) is not None:
            missing.append(f"{name}: left out, {reason}")
            print(missing[-1], flush=True)
        else:
            run(every[name], known, keep, args.variants)
    head = (
        f"{described(environment(args.commit), timed=False)}; `python -m benchmarks.quality.data_free`. Seed 0, "
        f"without retraining. Bold: within .002 of the network's best. CIFAR-10: {IMAGES} test images, SmolLM2: "
        f"{WINDOWS} windows. Of MiniLM and SmolLM2, which have no convolutions, shares are of what may be compressed."
    )
    made = page("# Plans without data", head, *missing, summary(known), *tables(known, list(every)))
    (RESULTS / "quality" / "data_free.md").write_text(made)
    print(made)


if __name__ == "__main__":
    main()
