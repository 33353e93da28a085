"""Deployed against dense on one CPU thread, float32, channels-last: several models and plans.

The deployed model and the dense one (the model before compression) take turns in a run of their own after deploy has
measured, with the same plan as plain factors (same ranks, no pivots), compressed and deployed. Writes
benchmarks/results/<name>.json and .md.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import time
from functools import partial

import torch
from torch import nn

import alds_fast as alds
from alds_fast.measurement import inference, interleaved_ms, median_ratio
from benchmarks.common.networks import resnet50
from benchmarks.common.results import described, environment, page, table, write


def vgg(seed: int = 0) -> nn.Module:
    """The convolutions of VGG-11 (Simonyan and Zisserman 2014) with BatchNorm, random weights, for 64 x 64 pictures."""
    torch.manual_seed(seed)
    layers: list[nn.Module] = []
    channels = 3
    for width, pool in ((64, 1), (128, 1), (256, 0), (256, 1), (512, 0), (512, 1), (512, 0), (512, 1)):
        layers += [nn.Conv2d(channels, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU()]
        layers += [nn.MaxPool2d(2)] if pool else []
        channels = width
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(512, 1000)).eval()


def mlp(seed: int = 0) -> nn.Module:
    """Four linear layers of width 1024."""
    torch.manual_seed(seed)
    return nn.Sequential(*[m for _ in range(4) for m in (nn.Linear(1024, 1024), nn.GELU())]).eval()


DEFAULT: dict = {"params": 0.5}
PLAIN: dict = {"params": 0.5, "pivots": False}
FORTY: dict = {"params": 0.4, "groups": (1, 2), "align": 8}
CASES = {
    "ResNet-50 b1, default plan": (resnet50, (1, 3, 224, 224), DEFAULT),
    "ResNet-50 b1, 50 %, pivots=False": (resnet50, (1, 3, 224, 224), PLAIN),
    "ResNet-50 b1, 40 %, groups (1, 2), align 8": (resnet50, (1, 3, 224, 224), FORTY),
    "VGG-11 b4 64x64, default plan": (vgg, (4, 3, 64, 64), DEFAULT),
    "VGG-11 b4 64x64, 40 %, groups (1, 2), align 8": (vgg, (4, 3, 64, 64), FORTY),
    "VGG-11 b4 64x64, 40 %, all groups": (vgg, (4, 3, 64, 64), {"params": 0.4}),
    "MLP 4 x 1024, 64 rows, default plan": (mlp, (64, 1024), DEFAULT),
    "MLP 4 x 1024, 64 rows, 50 %, pivots=False": (mlp, (64, 1024), PLAIN),
    "MLP 4 x 1024, 1 row, default plan": (mlp, (1, 1024), DEFAULT),
}


def without_pivots(plan: alds.Plan) -> alds.Plan:
    """The plan with plain factors of the same ranks."""
    fields = json.loads(plan.to_json())
    fields["layers"] = [{**row, "pivots": ""} for row in fields["layers"]]
    return alds.Plan.from_json(json.dumps(fields))


def run(build, shape: tuple[int, ...], options: dict, rounds: int) -> dict[str, object]:
    """Latencies of dense, compressed and deployed, from one run in which they take turns."""
    model, x = build(), torch.randn(shape)
    if len(shape) == 4:
        model, x = model.to(memory_format=torch.channels_last), x.contiguous(memory_format=torch.channels_last)
    small = alds.compress(model, **options)
    plan = small.alds_plan
    plain = without_pivots(plan).apply(model)
    begin = time.perf_counter()
    fast, table = alds.deploy(small, x, report=True)
    seconds = time.perf_counter() - begin
    made = {
        "dense": model,
        "compressed": small,
        "deployed": fast,
        "plain": plain,
        "plain deployed": alds.deploy(plain, x),
    }
    with contextlib.ExitStack() as stack:
        for side in made.values():
            stack.enter_context(inference(side))
        sides = {name: partial(side, x) for name, side in made.items()}
        times = interleaved_ms(sides, "cpu", rounds=rounds, min_ms=20.0)
        distance = float((fast(x) - small(x)).norm() / small(x).norm())
    won: dict[str, int] = {}
    for row in (row for row in table.rows if row.kind != "merged"):
        won[row.won.split(",")[0]] = won.get(row.won.split(",")[0], 0) + 1
    speed_up = {s: 1 / median_ratio(times, s, "dense") for s in made if s != "dense"}
    ms = {s: sorted(t)[len(t) // 2] for s, t in times.items()}
    return {
        "ms": ms, "speed_up": speed_up, "over_plain": 1 / median_ratio(times, "deployed", "plain deployed"),
        "pivoted": sum(bool(row.pivots) for row in plan.layers), "won": won, "kept": table.kept,
        "params": plan.keep_ratio, "reshaped": sum("," in row.won for row in table.rows), "deploy_s": seconds,
        "distance_of_outputs": distance,
    }  # fmt: skip


def markdown(results: dict) -> str:
    """The results as a table."""
    head = f"{described(results['environment'])}; float32, channels-last"
    layers, rows = "layers dense / two-op (reshaped)", []
    for name, r in results["cases"].items():
        won = f"{r['won'].get('dense', 0)} / {r['won'].get('two-op', 0)} ({r['reshaped']})"
        won += ", kept dense as a whole" if r["kept"] == "dense" else ""
        speed = [f"{s:.2f}x" for s in (*r["speed_up"].values(), r["over_plain"])]
        won += f", {r['pivoted']} with pivots"
        rows.append([name, f"{r['params']:.0%}", f"{r['ms']['dense']:.2f}", *speed, won, f"{r['deploy_s']:.1f}"])
    sides = ["compressed", "deployed", "plain", "plain deployed", "deployed / plain deployed"]
    headers = ["model and plan", "kept", "dense ms", *sides, layers, "deploy s"]
    return page(head, table(headers, rows))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--name", default="deploy_cpu", help="of the files under benchmarks/results")
    args = parser.parse_args()
    torch.set_num_threads(1)
    cases = {}
    for name, (build, shape, options) in CASES.items():
        cases[name] = run(build, shape, options, args.rounds)
        print(name, cases[name], flush=True)
    results = {"environment": environment(), "cases": cases}
    write(args.name, results, markdown(results))


if __name__ == "__main__":
    main()
