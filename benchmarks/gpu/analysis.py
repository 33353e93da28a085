"""Spectra, plan and factors on a GPU: a ResNet-50, and the linear layers of a Llama-7B in bf16.

    python -m benchmarks.gpu.analysis                         # writes benchmarks/results/analysis_<device>.json, .md
    python -m benchmarks.gpu.analysis --quick --device cpu    # tiny sizes: shows that it works

Every step is kept as soon as it is done. Of the Llama's three shapes one matrix each is measured first, against
torch.linalg.svdvals of every slice, its spectra in float32 too; then all 224, if by these times they fit into what is
left of ``--minutes``. Weights are random, spectra flat; singular values of 1, 2 and 4 slices. Seconds are wall time.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

import alds_fast as alds
from alds_fast import linalg
from alds_fast.bench import synchronize
from benchmarks.common.networks import SHAPED
from benchmarks.common.results import described, environment, page, save, table

from .device import add_options, check_options, device_name, results_file

GROUPS, KEEP = (1, 2, 4), 0.8
Results = dict[str, Any]


def seconds(call: Callable[[], Any], device: str) -> tuple[float, Any]:
    """Wall time of a call until the device has done its part, and what it returned."""
    synchronize(torch.device(device))
    begin = time.perf_counter()
    result = call()
    synchronize(torch.device(device))
    return time.perf_counter() - begin, result


def linear(rows: int, cols: int, seed: int, device: str) -> nn.Module:
    """A bf16 layer with random weights."""
    with torch.device("meta"):
        layer = nn.Linear(cols, rows, bias=False, dtype=torch.bfloat16)
    layer.to_empty(device=device)
    generator = torch.Generator(device).manual_seed(seed)
    with torch.no_grad():
        layer.weight.normal_(generator=generator)
    return layer


def steps(model: nn.Module, device: str, **options: Any) -> dict[str, float]:
    """Seconds of analysis, plan and factors."""
    analysed, analysis = seconds(lambda: alds.analyze(model, **options), device)
    planned, plan = seconds(lambda: analysis.plan(params=KEEP), device)
    applied, small = seconds(lambda: plan.apply(model), device)
    times = {"spectra_s": analysed, "plan_s": planned, "factors_s": applied, "all_s": analysed + planned + applied}
    reports = vars(small)["alds_factors"].values()
    return times | {"randomized": sum(r.method == "randomized" for r in reports)}


def warm_steps(model: nn.Module, device: str, **options: Any) -> dict[str, float]:
    """The steps, after a warm-up."""
    steps(model, device, **options)
    return steps(model, device, **options)


def in_float32(layer: nn.Module, device: str) -> dict[str, float]:
    """Seconds of the spectra in float32, and how far off squared errors of ranks are, of ||W||^2."""
    matrix = layer.weight.detach().float()[None]
    linalg.spectra([matrix], [GROUPS], float32=True)
    time_s, (float32_spectra,) = seconds(lambda: linalg.spectra([matrix], [GROUPS], float32=True), device)
    off = 0.0
    for single, double in zip(float32_spectra, linalg.spectra([matrix], [GROUPS])[0], strict=True):
        tails = [v.square().flatten(0, -2).sum(0).flip(0).cumsum(0) for v in (single, double)]
        off = max(off, float(((tails[0] - tails[1]) / tails[1][-1]).abs().max()))
    return {"spectra32_s": time_s, "off32": off}


def slice_by_slice(layer: nn.Module, device: str) -> float:
    """Seconds of torch.linalg.svdvals of every slice, one after the other, in float32."""
    weight = layer.weight.detach().float()
    parts = [part for k in GROUPS for part in weight.chunk(k, 1)]
    return seconds(lambda: [torch.linalg.svdvals(part) for part in parts], device)[0]


def measure(args: argparse.Namespace, results: Results, save: Callable[[], None]) -> None:
    """Everything, as far as the time goes."""
    torch.manual_seed(0)
    resnet = SHAPED["resnet18" if args.quick else "resnet50"]().to(args.device)
    if not args.quick:
        results["resnet50"] = warm_steps(resnet, args.device)
        save()
    width, inner, blocks = (64, 176, 2) if args.quick else (4096, 11008, 32)
    counts = {(width, width): 4 * blocks, (inner, width): 2 * blocks, (width, inner): blocks}
    results["llama"] = {"counts": {f"{r}x{c}": n for (r, c), n in counts.items()}, "one": {}, "all": None}
    one = results["llama"]["one"]
    for (rows, cols), count in counts.items():
        layer = linear(rows, cols, 0, args.device)
        times = warm_steps(layer, args.device, schemes=(0,), groups=GROUPS) | in_float32(layer, args.device)
        times["svdvals32_s"] = slice_by_slice(layer, args.device)
        times["spectra_ratio"] = times["svdvals32_s"] / times["spectra_s"]
        one[f"{rows}x{cols}"] = times | {"count": count}
        save()
    expected = sum(f["count"] * f["all_s"] for f in one.values())
    remaining_s = args.deadline - time.time()
    results["llama"]["expected_s"] = expected
    if expected > 0.8 * remaining_s:
        results["llama"]["not_run"] = f"all layers: {expected:.0f} s expected, {remaining_s:.0f} s left"
        return
    shapes = [shape for shape, count in counts.items() for _ in range(count)]
    model = nn.ModuleList(linear(*shape, seed, args.device) for seed, shape in enumerate(shapes))
    results["llama"]["all"] = steps(model, args.device, schemes=(0,), groups=GROUPS)


def markdown(results: Results) -> str:
    """The results as Markdown."""
    llama = results.get("llama", {})
    cases = {"ResNet-50, all schemes": results["resnet50"]} if "resnet50" in results else {}
    cases |= {f"{shape}, one of {f['count']}": f for shape, f in llama.get("one", {}).items()}
    if llama.get("all"):
        cases[f"all {sum(llama['counts'].values())}"] = llama["all"]
    parts = ("spectra", "plan", "factors", "all")
    return page(
        f"{described(results['about'])}; `python -m benchmarks.gpu.analysis`",
        f"Seconds, {KEEP:.0%} of the parameters kept:",
        table(["", *parts], [[n, *(f"{f[f'{part}_s']:.3f}" for part in parts)] for n, f in cases.items()]),
        table(
            ["", "svdvals of every slice, float32, s", "our spectra are", "in float32, s",
             "squared errors then off by"],
            [[shape, f"{f['svdvals32_s']:.3f}", f"{f['spectra_ratio']:.1f}x faster", f"{f['spectra32_s']:.3f}",
              f"{f['off32']:.1e}"] for shape, f in llama.get("one", {}).items()],
        ),
        f"Not run: {llama['not_run']}." if llama.get("not_run") else "",
    )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=8.0)
    add_options(parser)
    args = parser.parse_args()
    check_options(parser, args)
    args.deadline = time.time() + 60 * args.minutes
    about = {**environment(), "device": device_name(args.device), "quick": args.quick}
    results: Results = {"about": about}
    file = results_file(args, "analysis")
    measure(args, results, lambda: save(file, results, markdown(results)))
    save(file, results, markdown(results))
    print(markdown(results))


if __name__ == "__main__":
    main()
