"""Writes docs/measurements.md and the table of figures in README.md from the files under benchmarks/results.

``python docs/make_measurements.py`` after new results; a test compares both texts with what this script would write.
It needs the library, and no GPU.
"""

from __future__ import annotations

import csv
import functools
import json
import statistics
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the benchmarks are not installed
from alds_fast.files import write_text
from benchmarks.common.results import RESULTS, ROOT, page, table
from benchmarks.zoo import table as zoo_table

PAGE, README = ROOT / "docs" / "measurements.md", ROOT / "README.md"
BEGIN, END = "<!-- written by docs/make_measurements.py -->", "<!-- end -->"
LINK = "../benchmarks/results"

COMMANDS = {
    "cpu": "python -m benchmarks.cpu.suite",
    "cpu_passive": "OMP_WAIT_POLICY=PASSIVE python -m benchmarks.cpu.suite --name cpu_passive",
    "deploy_cpu": "python -m benchmarks.cpu.deploy",
    "latency_budget": "python -m benchmarks.cpu.latency_budget",
    "large": "python -m benchmarks.cpu.large",
    "large_with_data": "python -m benchmarks.cpu.large_with_data --blocks 31 62 --count 8 --length 512 --no-refit",
    "aot_triton_3.9": "python -m benchmarks.gpu.aot_table",
    "aot_triton_3.6": "python -m benchmarks.gpu.aot_table",
    "zoo": "make zoo",
}
SIDES = {
    "alds_fast": "alds_fast, float64",
    "alds_fast32": "alds_fast, float32",
    "eigvalsh64": "`torch.linalg.eigvalsh`, one batch per slice count, float64",
    "eigvalsh32": "the same in float32",
    "svdvals64": "`torch.linalg.svdvals`, slice by slice, float64",
    "svdvals32": "the same in float32",
}
VARIANTS = {
    "sensitivity p=2 refit": "**alds_fast with data, gradients and `refit`**",
    "sensitivity p=2": "**alds_fast with data and gradients** (default there)",
    "frobenius p=4 refit": "alds_fast, criterion without data, and `refit`",
    "frobenius p=4": "**alds_fast without data** (default)",
    "pca": "`pca`, from data",
    "l-rank": "`l-rank`",
    "alds-heuristic reference": "`alds-heuristic`, criterion of the authors' code",
    "svd-energy": "`svd-energy`",
    "svd-nuclear": "`svd-nuclear`",
    "uniform": "`uniform`",
    "svd": "`svd`",
    "filters uniform": "filter pruning, the same share everywhere",
    "filters global": "filter pruning, one threshold",
}
QUALITY = ("quality", "compared", "moments_cost", "retrained", "peers")
QUOTED = {*COMMANDS, *(f"quality/{name}" for name in QUALITY)}  # files that have a section here

BY_HAND = [  # what, figure, commit where it is known
    ("Spectra of the ResNet-50-shaped model on an AMD EPYC, times faster than torch's four routines above",
     "5.8, 3.3, 16, 12", "ba6dcff"),
    ("`make demo`, CREPE, 22.2 M parameters, at half of them: 800 synthesised tones within 50 cents, before, after",
     "99.37 %, 99.50 %", ""),
    ("The same: file before and after; a batch of 32 frames on two cores, other work on the machine",
     "89.0 MB, 44.5 MB; 1.32x faster", ""),
    ("`examples/retrain.py` at 15 %, one seed, 450 images: dense, compressed, six epochs, three cycles of six",
     ".987, .956, .993, .993", ""),
    ("The same at 5 %: compressed, six epochs, three cycles", ".178, .891, .920", ""),
    ("Queries, keys and values of SmolLM2 / MiniLM stacked, relative Frobenius error with pivots over that of three "
     "matrices of as many parameters, median of the layers, at 80, 60, 50, 30 %",
     "1.06, 1.04, 1.05, 1.04 / 1.14, 1.05, 1.04, 1.03", "6572fbf"),
]  # fmt: skip


def load(name: str) -> Any:
    return json.loads((RESULTS / f"{name}.json").read_text())


def source(name: str) -> str:
    """Where a section's figures are from: hardware, versions, commit, the command and the files."""
    e = load(name)["environment"]
    threads = f"{e['threads']} thread" + "s" * (e["threads"] != 1)
    machine = f"{e['cpu']}, {e['cores']} cores, {threads}, torch {e['torch']}, commit {e['commit']}"
    policy = "" if e["omp_wait_policy"] == "default" else f", `OMP_WAIT_POLICY={e['omp_wait_policy']}`"
    return f"{machine}{policy}.\n`{COMMANDS[name]}` writes [{name}.md]({LINK}/{name}.md) and `{name}.json`."


def markdown_tables(path: Path) -> list[list[list[str]]]:
    """The tables of a Markdown file, each as rows of cells, heads first."""
    tables: list[list[list[str]]] = [[]]
    for line in path.read_text(encoding="utf-8").splitlines():
        if line.startswith("|"):
            cells = [cell.strip() for cell in line.strip("| ").split(" | ")]
            tables[-1] += [] if set("".join(cells)) <= set("-| ") else [cells]
        elif tables[-1]:
            tables.append([])
    return [rows for rows in tables if rows]


def spectra(name: str) -> str:
    data = load(name)["spectra"]
    ours = [side for side in ("alds_fast", "alds_fast32") if side in data["times"]]
    head = ["", "wall seconds", "CPU-seconds", *(f"{SIDES[side]} is" for side in ours)]
    rows = []
    for side, time in data["times"].items():
        ratios = [f"{time['wall_s'] / data['times'][fast]['wall_s']:.1f}x faster" for fast in ours]
        cells = ["" if side in ours else ratio for ratio in ratios]
        rows.append([SIDES[side], f"{time['wall_s']:.2f}", f"{time['cpu_s']:.2f}", *cells])
    return table(head, rows)


def compression() -> list[str]:
    data = load("cpu")
    rows = [[n, f"{t['wall_s']:.2f}", f"{t['cpu_s']:.2f}"] for n, t in data["compress"].items()]
    return [
        table(["`compress(params=0.5)`", "wall seconds", "CPU-seconds"], rows),
        "The allocator alone, on 300 layers x 12 slice counts x 4096 ranks:",
        table(["", "wall seconds"], [[n, f"{t['wall_s']:.2f}"] for n, t in data["allocator"].items()]),
    ]


def memory() -> list[str]:
    cases = load("cpu")["memory"]
    columns = ("analysis_mb", "spectra_kept_mb", "workspace_mb", "factorise_mb", "result_mb")
    head = ["extra memory, MB", "analysis, peak", "of it spectra kept", "workspace of the largest layer"]
    head += ["factors, peak", "of it the new model"]
    ratios = [m["analysis_mb"] / m["workspace_mb"] for m in cases.values()]
    extra = [(m["factorise_mb"] - m["result_mb"]) / m["workspace_mb"] for m in cases.values()]
    return [
        table(head, ([name, *(f"{m[c]:.0f}" for c in columns)] for name, m in cases.items())),
        f"The analysis takes {min(ratios):.1f} to {max(ratios):.1f} times the workspace of the largest layer. The "
        f"factors take {min(extra):.1f} to {max(extra):.1f} times that workspace beside the new model.",
    ]


def deployed() -> str:
    sides = "compressed", "deployed", "plain", "plain deployed"
    head = ["model and plan", "parameters kept", "dense, ms", *sides, "layers dense / two-op"]
    rows = []
    for name, case in load("deploy_cpu")["cases"].items():
        won = f"{case['won'].get('dense', 0)} / {case['won'].get('two-op', 0)}, {case['reshaped']} of them reshaped"
        speed = [f"{case['speed_up'][side]:.2f}x" for side in sides]
        rows.append([name, f"{case['params']:.0%}", f"{case['ms']['dense']:.3g}", *speed, won])
    return table(head, rows)


def latency() -> list[str]:
    d = load("latency_budget")["latency"]
    rows = [["alds_fast", f"{d['measured_applied']:.3f}", f"{d['largest_error']:.3f}"]]
    for name, case in d["uniform"].items():
        plan = f"the same share of the full rank everywhere, {name}, {case['rank_share']:.2f}"
        rows.append([plan, f"{case['latency']:.3f}", f"{case['largest_error']:.3f}"])
    return [
        f"`plan(latency={d['asked']})` of a ResNet-50: {d['measured']:.3f} measured while planning, "
        f"{d['measured_applied']:.3f} for the compressed model itself, in {d['plan_s']:.0f} s without earlier timings. "
        f"{d['factorised']} of {d['layers']} layers are factorised, {d['params']:.0%} of the parameters are left.",
        table(["plan", "share of the dense latency", "largest relative error"], rows),
    ]


def large() -> list[str]:
    d = load("large")
    head = ["one matrix, one thread", "singular values, float64, s", "float32, s", "factors, s", "at rank"]
    shapes = [[f"{r['rows']} x {r['cols']}", f"{r['spectra64_s']:.3f}", f"{r['spectra_s']:.3f}",
               f"{r['factors_s']:.3f}", r["rank"]] for r in d["by_shape"]]  # fmt: skip
    runs = [[r["layers"], f"{r['gb']:.2f}", f"{r['processes']} x {r['threads']}", f"{r['wall_s']:.0f}",
             f"{r['cpu_s']:.0f}", f"{r['peak_mb'] / 1e3:.2f}"] for r in d["checkpoints"]]  # fmt: skip
    gpt = d["gpt2_small"]
    return [
        "Llama-shaped checkpoints, bfloat16, 70 % of the parameters kept, 1, 2, 4, 8 and 16 slices. Other work took a "
        "share of the machine while the cases of 4 layers ran.",
        table(["layers", "GB", "processes x threads", "wall seconds", "CPU-seconds", "peak GB of a process"], runs),
        "A square layer of n columns costs in proportion to n^3, whatever is kept:",
        table(head, shapes),
        f"The linear layers of GPT-2-small, 85 M parameters, in memory, to 70 %: {gpt['wall_s']:.1f} s, "
        f"{gpt['cpu_s']:.1f} CPU-seconds.",
        f"With the same rates, on paper: {', '.join(f'{n} {s / 3600:.1f} CPU-hours' for n, s in d['paper'].items())}.",
    ]


def large_with_data() -> list[str]:
    rows = []
    for job in load("large_with_data")["jobs"]:
        head = f"{job['gb']:.2f}", f"{job['count']} x {job['length']}", "yes" if job["refit"] else "no"
        rows += [
            [*head, s["stage"], f"{s['wall_s']:.0f}", f"{s['cpu_s']:.0f}", f"{s['peak_mb'] / 1e3:.2f}"]
            for s in job["stages"]
        ]
    return [
        "Such checkpoints with data and `--sensitivity`. Other work took a share of the machine: what counts are "
        "CPU-seconds.",
        table(["GB", "tokens", "refit", "stage", "wall seconds", "CPU-seconds", "peak GB"], rows),
    ]


@functools.cache
def quality_rows() -> tuple[dict[str, float], dict[tuple[str, str, float], float]]:
    """Mean quality over the seeds: of the dense networks, and by variant, network and share."""
    cells: dict[tuple[str, str, float], list[float]] = defaultdict(list)
    with open(RESULTS / "quality" / "quality.csv", newline="") as file:
        for row in csv.DictReader(file):
            if row["status"] == "done":
                cells[row["variant"], row["network"], float(row["share"])].append(float(row["quality"]))
    means = {key: statistics.fmean(values) for key, values in cells.items()}
    return {n: q for (v, n, _), q in means.items() if v == "dense"}, means


def drops(variant: str, share: float) -> list[float]:
    """What a variant loses on every network at a share, over the networks that are compressed as a whole."""
    dense, means = quality_rows()
    return [dense[n] - q for (v, n, s), q in means.items() if (v, s) == (variant, share)]


def quality() -> str:
    head, rows = ["drop of the quality"], []
    for share in (0.5, 0.3, 0.15):
        head += [f"{share:.0%}: median", "largest"]
    for variant, text in VARIANTS.items():
        cells = [drops(variant, share) for share in (0.5, 0.3, 0.15)]
        numbers = [f"{value:.4f}" for lost in cells for value in (statistics.median(lost), max(lost))]
        rows.append([text, *numbers, ", ".join(dict.fromkeys(str(len(lost)) for lost in cells))])
    return table([*head, "networks"], rows)


def minilm() -> str:
    _, means = quality_rows()
    shares = sorted({s for _, n, s in means if n == "minilm" and s < 1}, reverse=True)
    names = [v for v, n, s in means if n == "minilm" and s == shares[0]]
    rows = [[f"`{v}`", *(f"{means[v, 'minilm', share]:.3f}" for share in shares)] for v in names]
    return table(["", "80 % of the encoder", "60 %"], rows)


def retrained() -> tuple[list[tuple[str, float]], str]:
    """Mean percent saved by variant, and the table by network."""
    head, *rows = markdown_tables(RESULTS / "quality" / "retrained.md")[0]
    means = [(row[0], statistics.fmean(float(cell.strip("*")) for cell in row[1:])) for row in rows]
    ordered = [[*row, f"{mean:.0f}"] for row, (_, mean) in zip(rows, means, strict=True)]
    return means, table([*head, "mean"], ordered)


def compared() -> str:
    head, *rows = markdown_tables(RESULTS / "quality" / "compared.md")[0]
    return table(head, [row for row in rows if row[0].startswith(("sensitivity", "output p=4"))])


def peers() -> list[str]:
    """Of the language model, by text; nothing before ``python -m benchmarks.quality.peers`` has run."""
    file = RESULTS / "quality" / "peers.md"
    if not file.exists():
        return []
    titles = [line[3:] for line in file.read_text(encoding="utf-8").splitlines() if line.startswith("## ")]
    parts = zip(titles, markdown_tables(file), strict=True)
    about = (
        "SmolLM2-135M by share of its decoder's linear layers: perplexity over the dense model's, by text, and "
        f"CPU-seconds ([hardware, commits]({LINK}/quality/peers.md)). Others' methods are our own code of them."
    )
    return [about, *(part for title, (head, *rows) in parts for part in (f"{title}:", table(head, rows)))]


def moments() -> str:
    before, since = markdown_tables(RESULTS / "quality" / "moments_cost.md")
    rows = [[*row, state] for rows, state in ((before[1:], "0dfb9a7"), (since[1:], "fe002bf")) for row in rows]
    return table([*before[0], "commit"], rows)


def compiled(name: str) -> list[str]:
    kinds: dict[tuple[str, str], list[dict[str, Any]]] = defaultdict(list)
    for row in load(name)["rows"]:
        kinds[row["kernel"], row["dtype"]].append(row)
    head = ["kernel", "type", "compilations", "that spill", "most registers", "most shared KiB"]
    cells = [[*kind, len(of), sum(r["spilled_bytes"] > 0 for r in of), max(r["registers"] for r in of),
              f"{max(r['shared_bytes'] for r in of) / 1024:.0f}"] for kind, of in kinds.items()]  # fmt: skip
    return [source(name), f"Triton {load(name)['environment']['triton']}, sm_80 and sm_90.", table(head, cells)]


def others() -> str:
    """Results that have no section of their own."""
    names = sorted(p.relative_to(RESULTS).with_suffix("").as_posix() for p in RESULTS.rglob("*.md"))
    return "\n".join(f"- [{name}]({LINK}/{name}.md)" for name in names if name not in QUOTED)


def sections() -> dict[str, list[str]]:
    """The paragraphs and tables of every section, by its title."""
    return {
        "Spectra against torch": [
            source("cpu"),
            "A ResNet-50-shaped model with float32 weights: 54 layers, encode fold, all divisors of the channels as "
            "slice counts. Medians of three rounds in which the sides take turns.",
            spectra("cpu"),
            "`OMP_WAIT_POLICY=PASSIVE`, which shared machines often want, slows torch's routines down. This is one "
            "round, at another commit:",
            source("cpu_passive"),
            spectra("cpu_passive"),
        ],
        "From a model to its half-sized copy": [source("cpu"), *compression()],
        "Memory": [source("cpu"), *memory()],
        "Large checkpoints": [source("large"), *large()],
        "Large checkpoints with data": [source("large_with_data"), *large_with_data()],
        "Deployed against dense": [
            source("deploy_cpu"),
            "float32, channels-last, random weights, the sides taking turns. Plain: the same plan without pivots.",
            deployed(),
        ],
        "A budget on latency": [
            source("latency_budget"),
            "Random weights whose singular values fall like 1/i, batch 1, 224 x 224, float32, channels-last.",
            *latency(),
        ],
        "Quality without retraining": [
            f"[quality.md]({LINK}/quality/quality.md) says the hardware and the commits; the cells are in "
            f"[quality.csv]({LINK}/quality/quality.csv). `make quality` does it again.",
            "Networks with their own tasks, see [benchmarks/quality](../benchmarks/quality/README.md), means over "
            "three seeds. The last column counts the networks, at 50, 30 and 15 % where the counts differ.",
            quality(),
            "Rank correlation of the similarities of MiniLM's embeddings with the dense model's, one sample. Its "
            "linear layers alone are compressed; `sensitivity` is that of the pooled embeddings.",
            minilm(),
            "In the rows with data, moments are not shrunk by their noise. "
            f"Seed 0 with shrunk moments differs by ([all variants]({LINK}/quality/compared.md)):",
            compared(),
        ],
        "Quality after retraining": [
            "Percent of the parameters saved at a loss of half a point at most. Retraining takes the last quarter of "
            f"the epochs ([hardware, commits, shares]({LINK}/quality/retrained.md)).",
            retrained()[1],
        ],
        "Language models, peers side by side": peers(),
        "What moments cost": [f"[moments_cost.md]({LINK}/quality/moments_cost.md), one thread.", moments()],
        "The zoo": [source("zoo"), zoo_table.ABOUT, zoo_table.summary(load("zoo")["rows"])],
        "Kernels, compiled": [*compiled("aot_triton_3.9"), *compiled("aot_triton_3.6")],
        "Other results": [others()],
        "Measured once, by hand": [
            "These are measured by hand. No file holds them, and no script repeats them.",
            table(["what", "figure", "commit"], BY_HAND),
            "[defaults](defaults.md) and [notes](notes.md) have further ones, beside what they decided.",
        ],
    }


def measurements() -> str:
    """The text of docs/measurements.md; a section without a text is left out."""
    parts = [
        "# Measurements",
        BEGIN,
        "Every figure stands beside its baseline, with hardware, versions and commit. "
        "`python docs/make_measurements.py` writes this page from the committed results.",
    ]
    for title, texts in sections().items():
        parts += [f"## {title}", *texts] if any(texts) else []
    return page(*parts)


def figures() -> str:
    """The six figures of README.md, each with its baseline."""

    def median_and_largest(variant: str, share: float) -> str:
        lost = drops(variant, share)
        return f"{statistics.median(lost):.4f} / {max(lost):.4f}"

    saved = dict(retrained()[0])
    latency = load("latency_budget")["latency"]
    times = load("cpu")["spectra"]["times"]
    model = max(load("large")["checkpoints"], key=lambda case: case["gb"])
    heuristic, plain = "alds-heuristic reference", "frobenius p=4"
    rows = [
        ["Drop of accuracy at 50 % of the parameters, no data, no retraining: median / largest of 11 networks",
         median_and_largest(plain, 0.5), f"`l-rank`: {median_and_largest('l-rank', 0.5)}; the paper's search: "
         f"{median_and_largest(heuristic, 0.5)}"],
        ["The same at 30 %, with data, gradients and `refit`", median_and_largest("sensitivity p=2 refit", 0.3),
         f"`pca`, also with data: {median_and_largest('pca', 0.3)}"],
        ["Parameters saved at half a point lost, after retraining, mean of 9 networks",
         f"{saved['sensitivity p=2']:.0f} %", f"`pca`: {saved['pca']:.0f} %; the paper's search: "
         f"{saved[heuristic]:.0f} %"],
        [f"ResNet-50 of random weights, `latency={latency['asked']}`, batch 1, one CPU thread",
         f"{1 / latency['measured_applied']:.2f}x faster", f"the dense model: {latency['dense_ms']:.1f} ms"],
        ["Spectra of a ResNet-50-shaped model, two CPU threads, float32 / float64",
         f"{times['alds_fast32']['wall_s']:.2f} / {times['alds_fast']['wall_s']:.2f} s",
         f"`torch.linalg.eigvalsh`: {times['eigvalsh32']['wall_s']:.2f} / {times['eigvalsh64']['wall_s']:.2f} s"],
        [f"Peak memory while a checkpoint of {model['gb']:.2f} GB is compressed, {model['wall_s']:.0f} s",
         f"{model['peak_mb'] / 1e3:.2f} GB", f"to load it as a whole: at least {model['gb']:.2f} GB"],
    ]  # fmt: skip
    return table(["", "alds_fast", "baseline"], rows)


def readme() -> str:
    """The text of README.md with the figures as they are."""
    before, _, rest = README.read_text(encoding="utf-8").partition(BEGIN)
    return f"{before}{BEGIN}\n{figures()}\n{END}{rest.partition(END)[2]}"


def main() -> None:
    for path, text in ((PAGE, measurements()), (README, readme())):
        write_text(path, text)
        print(f"wrote {path.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
