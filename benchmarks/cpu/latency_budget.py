"""plan(latency=0.6) on a ResNet-50: what was asked, what is measured, and uniform-rank plans of that latency.

One thread, float32, channels-last. Every latency is a share of the dense model's, measured end to end with the two
sides taking turns. Writes benchmarks/results/<name>.json and .md.
"""

from __future__ import annotations

import argparse
import time
import warnings
from functools import partial

import torch

import alds_fast as alds
from alds_fast.allocation import MAX_LATENCY_GROUPS, end_to_end
from alds_fast.criteria import CRITERIA
from alds_fast.linalg import SCHEMES, Decomposition, max_rank, params_per_rank
from alds_fast.measurement import inference, interleaved_ms, median_ratio
from benchmarks.common.networks import resnet50
from benchmarks.common.results import described, environment, page, table, write

CPU = torch.device("cpu")
STEPS = 8  # of the bisection for the uniform plans


Choices = dict[str, Decomposition]


def uniform(analysis: alds.Analysis, keep: float, scheme: int, groups: int) -> tuple[Choices, float]:
    """Every layer at the same share of its full rank, with one fold and number of slices: choices and largest error.

    A layer whose channels that number does not divide takes one slice; one whose kernel does not know that fold takes
    the encode fold; one that would not get smaller stays dense.
    """
    chosen, largest = {}, 0.0
    for name, spectra in analysis.spectra.items():
        shape = spectra.layer.shape
        slices = groups if shape.slice_channels % groups == 0 else 1
        fold = scheme if (scheme, slices) in spectra.values else 0
        rank = max(1, round(keep * max_rank(shape, fold, slices)))
        if rank * params_per_rank(shape, fold, slices) < shape.numel:
            chosen[name] = Decomposition(fold, slices, rank)
            largest = max(largest, float(spectra.errors(fold, slices, CRITERIA["frobenius"].rule)[rank]))
    return chosen, largest


def uniform_at(model, x, analysis: alds.Analysis, scheme: int, groups: int, share: float) -> dict[str, float]:
    """The uniform plan with the largest ranks whose measured latency is at most that share, by bisection."""
    low, high, best = 0.0, 1.0, {}
    for _ in range(STEPS):
        keep = (low + high) / 2
        chosen, largest = uniform(analysis, keep, scheme, groups)
        measured = end_to_end(model, chosen, x, CPU)[0]
        if measured <= share:
            low, best = keep, {"rank_share": keep, "latency": measured, "largest_error": largest}
        else:
            high = keep
    return best


def applied(model, x, plan: alds.Plan) -> float:
    """Latency of the compressed model itself, with its real factors, over that of the dense one."""
    small = plan.apply(model)
    with inference(model), inference(small):
        times = interleaved_ms({"dense": partial(model, x), "compressed": partial(small, x)}, CPU, rounds=9)
    return median_ratio(times, "compressed", "dense")


def run(share: float, batch: int, side: int) -> dict[str, object]:
    """The plan and the uniform ones."""
    model = resnet50().to(memory_format=torch.channels_last)
    x = torch.randn(batch, 3, side, side).contiguous(memory_format=torch.channels_last)
    begin = time.perf_counter()
    analysis = alds.analyze(model, groups=tuple(range(1, MAX_LATENCY_GROUPS + 1)))
    analysed = time.perf_counter()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        plan = analysis.plan(latency=share, example_inputs=x, cache=False)
    planned = time.perf_counter()
    choices = {row.name: (row.scheme, row.groups, row.rank) for row in plan.layers if row.rank is not None}
    measured = applied(model, x, plan)
    print(plan)
    return {
        "asked": share, "batch": batch, "side": side, "measured": plan.latency.measured, "measured_applied": measured,
        "within_10_percent": abs(measured / share - 1) <= 0.1, "largest_error": plan.error, "params": plan.keep_ratio,
        "dense_ms": plan.latency.dense_ms, "compressed_ms": plan.latency.compressed_ms,
        "refinements": plan.latency.refinements, "warnings": [str(w.message) for w in caught],
        "analysis_s": analysed - begin, "plan_s": planned - analysed,
        "factorised": len(choices), "layers": len(plan.layers),
        "uniform": {
            f"fold {s}, {g} slices": uniform_at(model, x, analysis, s, g, max(measured, plan.latency.measured))
            for s in SCHEMES for g in (1, 2, 4, 8)
        },
    }  # fmt: skip


def markdown(results: dict) -> str:
    """The results as Markdown."""
    ours = results["latency"]
    head = f"{described(results['environment'])}; ResNet-50, batch {ours['batch']}, {ours['side']} x {ours['side']}, "
    head += "float32, channels-last, all folds"
    said = (
        f"`latency={ours['asked']}`: {ours['measured']:.3f} measured, {ours['measured_applied']:.3f} for the "
        f"compressed model itself; "
        f"{ours['dense_ms']:.0f} to {ours['compressed_ms']:.0f} ms; planned in {ours['plan_s']:.0f} s without cached "
        f"timings, {ours['refinements']} refinements; {ours['factorised']} of {ours['layers']} layers factorised, "
        f"{ours['params']:.1%} of the parameters"
    )
    rows = [["alds_fast", f"{ours['measured_applied']:.3f}", f"{ours['largest_error']:.4f}"]]
    for kind, row in ours["uniform"].items():
        if row:
            name = f"uniform, {kind}, {row['rank_share']:.3f} of the full rank"
            rows.append([name, f"{row['latency']:.3f}", f"{row['largest_error']:.4f}"])
        else:
            rows.append([f"uniform, {kind}", "none is that fast", ""])
    headers = ["plan", "share of the dense latency", "largest relative error"]
    return page(head, said, table(headers, rows))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--latency", type=float, default=0.6)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--side", type=int, default=224, help="of the pictures")
    parser.add_argument("--name", default="latency_budget", help="of the files under benchmarks/results")
    args = parser.parse_args()
    torch.set_num_threads(1)
    results = {"environment": environment(), "latency": run(args.latency, args.batch, args.side)}
    write(args.name, results, markdown(results))


if __name__ == "__main__":
    main()
