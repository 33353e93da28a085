"""Output pivots on one CPU thread, float32: plain factors and pivoted ones of the same rank, and of the same size.

Two linear layers with a ReLU between them, the first low-rank: its outputs are put in order, or taken by the second
layer as they come, or the identity is filled in. All sides take turns. Writes benchmarks/results/<name>.json and .md.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

import alds_fast as alds
from alds_fast.deployment import with_channels_in_order
from alds_fast.measurement import inference, interleaved_ms, median_ratio
from benchmarks.common.results import described, environment, page, table, write

SHAPES = ((576, 576), (768, 3072), (3072, 768), (2048, 2048))  # channels, filters
ROWS = (1, 16, 64, 512, 2048)
SHARE = 0.6  # of the dense weight, of plain factors
SIDES = ("plain", "in place", "in order", "identity filled in", "larger rank, in order")


def sides(channels: int, filters: int, rows: int) -> tuple[dict[str, nn.Module], Tensor]:
    """The dense model and the others; "larger rank" has as many numbers as "plain"."""
    torch.manual_seed(0)
    dense = nn.Sequential(nn.Linear(channels, filters), nn.ReLU(), nn.Linear(filters, 64)).eval()
    x = torch.randn(rows, channels)
    rank = int(SHARE * channels * filters / (channels + filters))
    budget = rank * (channels + filters)
    larger = next(
        r for r in range(min(channels, filters) - 1, 0, -1) if r * (channels + filters - r) + filters <= budget
    )

    def low_rank(rank: int, pivots: str) -> nn.Module:
        layer = alds.LowRankLinear.from_dense(dense[0], rank=rank, pivots=pivots)
        return nn.Sequential(layer, *dense[1:]).eval()

    pivoted, filled = low_rank(rank, "output"), low_rank(rank, "output")
    plain = alds.LowRankLinear(channels, filters, rank)
    encoder, decoder = filled[0].plain_factors()
    plain.load_state_dict({"encoder": encoder, "decoder": decoder, "bias": filled[0].bias})
    filled[0] = plain
    made = {"dense": dense, "plain": low_rank(rank, ""), "in place": pivoted, "identity filled in": filled}
    made["in order"] = with_channels_in_order(pivoted, x)
    made["larger rank, in order"] = with_channels_in_order(low_rank(larger, "output"), x)
    assert made["in order"][0].in_order and made["larger rank, in order"][0].in_order
    return made, x


def run(channels: int, filters: int, rows: int, rounds: int) -> dict[str, object]:
    """Milliseconds of all, and how many times faster than dense and than plain."""
    made, x = sides(channels, filters, rows)
    calls: dict[str, Callable[[], object]] = {name: partial(model, x) for name, model in made.items()}
    with inference(made["dense"]):
        times = interleaved_ms(calls, "cpu", rounds=rounds, min_ms=20.0)
    ms = {name: sorted(t)[len(t) // 2] for name, t in times.items()}
    faster = {other: {s: 1 / median_ratio(times, s, other) for s in SIDES} for other in ("dense", "plain")}
    ranks = {name: getattr(model[0], "rank", None) for name, model in made.items()}
    return {"channels": channels, "filters": filters, "rows": rows, "ranks": ranks, "ms": ms, "faster_than": faster}


def markdown(results: dict) -> str:
    """The results as a table."""
    rows = []
    for r in results["cases"]:
        over = r["faster_than"]
        cells = [f"{over['dense'][s]:.2f}x" + ("" if s == "plain" else f" ({over['plain'][s]:.2f})") for s in SIDES]
        ranks = f"{r['ranks']['plain']}, {r['ranks']['larger rank, in order']}"
        rows.append([f"{r['channels']} -> {r['filters']}", r["rows"], ranks, f"{r['ms']['dense']:.2f}", *cells])
    text = (
        f"Times as fast as dense, in brackets as plain factors of the first rank, which are {SHARE:.0%} of the dense "
        f"weight; the second rank has as many numbers."
    )
    head = f"{described(results['environment'])}; float32; a linear layer, ReLU, a dense layer to 64"
    return page(head, text, table(["layer", "rows", "ranks", "dense ms", *SIDES], rows))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--name", default="pivots_cpu", help="of the files under benchmarks/results")
    args = parser.parse_args()
    torch.set_num_threads(1)
    cases = []
    for channels, filters in SHAPES:
        for rows in ROWS:
            cases.append(run(channels, filters, rows, args.rounds))
            print(cases[-1], flush=True)
    results = {"environment": environment(), "cases": cases}
    write(args.name, results, markdown(results))


if __name__ == "__main__":
    main()
