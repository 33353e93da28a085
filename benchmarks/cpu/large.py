"""What large models cost: eigenproblems by size, whole checkpoints by size, threads and processes; peak memory.

Writes benchmarks/results/large.json and .md. Checkpoints are Llama-shaped, bfloat16, random: a low-rank part and
noise, so that 70 % of the weights leave relative errors of 36 %, as in MiniLM's encoder (37 %). They are removed
afterwards; the largest has 3 GB. Peak memory is the largest resident set of a process (VmHWM).
"""

from __future__ import annotations

import argparse
import json
import os
import re
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import torch

import alds_fast as alds
from alds_fast import linalg
from alds_fast.checkpoints import INDEX, Entry, write_shard
from alds_fast.cli import main as command
from benchmarks.common.measure import resident_mb, take_turns
from benchmarks.common.results import described, environment, page, table, write

KEEP = 0.7
SHAPE = {"hidden_size": 2048, "intermediate_size": 5632, "num_attention_heads": 32, "num_key_value_heads": 4}
VOCABULARY = 32000


def _layer_shapes() -> dict[str, tuple[int, ...]]:
    h, i = SHAPE["hidden_size"], SHAPE["intermediate_size"]
    kv = h * SHAPE["num_key_value_heads"] // SHAPE["num_attention_heads"]
    sizes = {"self_attn.q_proj": (h, h), "self_attn.k_proj": (kv, h), "self_attn.v_proj": (kv, h)}
    sizes |= {"self_attn.o_proj": (h, h), "mlp.gate_proj": (i, h), "mlp.up_proj": (i, h), "mlp.down_proj": (h, i)}
    norms = {"input_layernorm": (h,), "post_attention_layernorm": (h,)}
    return {f"{name}.weight": shape for name, shape in {**sizes, **norms}.items()}


def _values(shape: tuple[int, ...], seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    if len(shape) == 1:
        return torch.ones(shape, dtype=torch.bfloat16)
    rank = min(shape) // 2
    left, right = torch.randn(shape[0], rank, generator=generator), torch.randn(rank, shape[1], generator=generator)
    decay = torch.arange(1, rank + 1) ** -0.8
    noise = 1.5 * torch.randn(shape, generator=generator)
    return (0.02 * ((left * decay) @ right + noise)).to(torch.bfloat16)


def make_checkpoint(folder: Path, layers: int) -> int:
    """A Llama-shaped checkpoint directory, a layer to a file; returns its bytes."""
    folder.mkdir()
    config = {**SHAPE, "num_hidden_layers": layers, "vocab_size": VOCABULARY, "model_type": "llama"}
    config |= {"architectures": ["LlamaForCausalLM"], "dtype": "bfloat16", "tie_word_embeddings": False}
    (folder / "config.json").write_text(json.dumps(config))
    table = {"embed_tokens.weight": (VOCABULARY, SHAPE["hidden_size"]), "norm.weight": (SHAPE["hidden_size"],)}
    files = [{f"model.{n}": s for n, s in table.items()} | {"lm_head.weight": table["embed_tokens.weight"]}]
    files += [{f"model.layers.{i}.{n}": s for n, s in _layer_shapes().items()} for i in range(layers)]
    placed, size = {}, 0
    for number, tensors in enumerate(files):
        entries = [Entry(n, "BF16", s, 2 * torch.Size(s).numel()) for n, s in tensors.items()]
        path = folder / f"model-{number:05d}.safetensors"

        def content(entry: Entry) -> Iterator[memoryview]:
            seed = sum(map(ord, entry.name))
            yield memoryview(_values(entry.shape, seed).view(-1).view(torch.uint8).numpy()).cast("B")

        write_shard(path, entries, content)
        placed |= dict.fromkeys(tensors, path.name)
        size += sum(e.size for e in entries)
    (folder / INDEX).write_text(json.dumps({"metadata": {"total_size": size}, "weight_map": placed}))
    return size


def worker(arguments: list[str]) -> None:
    """The command line, and on standard error what it took."""
    begin = time.perf_counter()
    code = command(arguments)
    used = resource.getrusage(resource.RUSAGE_SELF)
    cpu = used.ru_utime + used.ru_stime
    usage = {"wall_s": time.perf_counter() - begin, "cpu_s": cpu, "peak_mb": resident_mb("VmHWM")}
    print("USED " + json.dumps(usage), file=sys.stderr)
    sys.exit(code)


def compress(source: Path, processes: int, threads: int) -> dict[str, float]:
    """Compress a checkpoint with so many processes of so many threads."""
    output = source.parent / "out"
    inner = ["-m", "benchmarks.cpu.large", "--worker"]
    inner += ["compress", str(source), "-o", str(output), "--params", str(KEEP)]
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    command = [sys.executable, *(launcher if processes > 1 else []), *inner]
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    begin = time.perf_counter()
    run = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
    wall = time.perf_counter() - begin
    used = [json.loads(report) for report in re.findall(r"USED (\{.*?\})", run.stderr)]
    assert len(used) == processes, run.stderr
    shutil.rmtree(output)
    return {
        "wall_s": wall,  # with starting Python and importing
        "work_s": max(u["wall_s"] for u in used),
        "cpu_s": sum(u["cpu_s"] for u in used),
        "peak_mb": max(u["peak_mb"] for u in used),
    }


def by_shape(shapes: list[tuple[int, int]]) -> list[dict[str, float]]:
    """One matrix, one thread: all singular values, twice, then factors at the rank that keeps 70 % of the weights."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    rows = []
    for f, c in shapes:
        w = torch.randn(1, f, c, generator=torch.Generator().manual_seed(0))
        rank = int(KEEP * f * c / (f + c))
        begin = time.perf_counter()
        values = linalg.spectra([w], [[1]])[0][0]
        double = time.perf_counter()
        linalg.spectra([w], [[1]], float32=True)
        middle = time.perf_counter()
        linalg.batched_rsvd([w], [1], [rank], [linalg.optimal_errors(values, rank)])
        end = time.perf_counter()
        n = min(f, c)
        gflop = (f * c * n + 4 / 3 * n**3) / 1e9  # half of the product, and the tridiagonalisation
        seconds = {"spectra64_s": double - begin, "spectra_s": middle - double, "factors_s": end - middle}
        rows.append({"rows": f, "cols": c, "rank": rank, "gflop": gflop, **seconds})
    torch.set_num_threads(threads)
    return rows


def gpt2_small(rounds: int) -> dict[str, float]:
    """The linear layers of GPT-2-small, random, compressed in memory: medians."""
    shapes = [(2304, 768), (768, 768), (3072, 768), (768, 3072)] * 12
    model = torch.nn.ModuleList(torch.nn.Linear(c, f) for f, c in shapes)
    return take_turns({"gpt2": lambda: alds.compress(model, params=KEEP)}, rounds)["gpt2"]


def _fit(rows: list[dict[str, float]], what: str) -> tuple[float, float]:
    """Seconds per n^3 and per rows * cols * n, the least squares of relative errors, from n = 1024 on."""
    used = [r for r in rows if min(r["rows"], r["cols"]) >= 1024]
    terms = [(min(r["rows"], r["cols"]) ** 3, r["rows"] * r["cols"] * min(r["rows"], r["cols"])) for r in used]
    scaled = torch.tensor([[x / r[what] for x in t] for t, r in zip(terms, used, strict=True)], dtype=torch.float64)
    coefficients = torch.linalg.lstsq(scaled, torch.ones(len(used), 1, dtype=torch.float64)).solution.flatten().tolist()
    return coefficients[0], coefficients[1]


def predicted(rows: list[dict[str, float]], shapes: list[tuple[int, int]]) -> float:
    """CPU-seconds of spectra (float32) with 1, 2 and 4 slices and of factors, of such layers, by what was measured."""
    spectra, factors = _fit(rows, "spectra_s"), _fit(rows, "factors_s")
    total = 0.0
    for f, c in shapes:
        for k in (1, 2, 4):
            n = min(f, c // k)
            total += k * spectra[0] * n**3
        n = min(f, c)
        total += spectra[1] * f * c * n + factors[0] * n**3 + factors[1] * f * c * n
    return total


def llama_shapes(hidden: int, inner: int, kv: int, layers: int, vocabulary: int) -> list[tuple[int, int]]:
    """Shapes of the linear layers of a Llama, the output embedding among them."""
    block = [(hidden, hidden), (kv, hidden), (kv, hidden), (hidden, hidden), (inner, hidden), (inner, hidden)]
    return [*block, (hidden, inner)] * layers + [(vocabulary, hidden)]


def markdown(results: dict) -> str:
    """The results as Markdown."""
    gpt2 = results["gpt2_small"]
    return page(
        f"{described(results['environment'])}; `python -m benchmarks.cpu.large`",
        table(
            ["one matrix, one thread", "singular values, float64, s", "float32, s", "GFLOP/s", "factors, s", "at rank"],
            [[f"{r['rows']} x {r['cols']}", f"{r['spectra64_s']:.3f}", f"{r['spectra_s']:.3f}",
              f"{r['gflop'] / r['spectra_s']:.1f}", f"{r['factors_s']:.3f}", r["rank"]] for r in results["by_shape"]],
        ),
        f"Linear layers of GPT-2-small, in memory, to {KEEP:.0%}: {gpt2['wall_s']:.1f} s, "
        f"{gpt2['cpu_s']:.1f} CPU-seconds.",
        f"Llama-shaped checkpoints, bfloat16, {KEEP:.0%} of the parameters kept, slices 1, 2, 4, ... 16:",
        table(
            ["layers", "GB", "processes x threads", "wall s", "of it work", "CPU s", "predicted",
             "peak MB of a process"],
            [[r["layers"], f"{r['gb']:.2f}", f"{r['processes']} x {r['threads']}", f"{r['wall_s']:.1f}",
              f"{r['work_s']:.1f}", f"{r['cpu_s']:.1f}", f"{r['predicted_s']:.0f}", f"{r['peak_mb']:.0f}"]
             for r in results["checkpoints"]],
        ),
        "On paper, with the same rates (predicted CPU-seconds are of spectra and factors alone):",
        table(["", "CPU-hours"], [[n, f"{s / 3600:.1f}"] for n, s in results["paper"].items()]),
    )  # fmt: skip


def main() -> None:
    if sys.argv[1:2] == ["--worker"]:
        worker(sys.argv[2:])
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="small sizes, to see that it runs; writes nothing")
    args = parser.parse_args()
    orders = [256, 1024] if args.quick else [256, 512, 1024, 2048, 4096]
    shapes = [shape for n in orders for shape in ((n, n), (4 * n, n))] + ([] if args.quick else [(8192, 8192)])
    cases = [(1, 1, 2)] if args.quick else [
        (4, 1, 1), (4, 1, 2), (4, 2, 1), (4, 4, 1), (14, 1, 1), (14, 2, 1), (31, 1, 2),
    ]  # fmt: skip
    results: dict = {"environment": environment(), "by_shape": by_shape(shapes), "checkpoints": []}
    results["gpt2_small"] = gpt2_small(1 if args.quick else 3)
    results["paper"] = {
        "Llama 7B": predicted(results["by_shape"], llama_shapes(4096, 11008, 4096, 32, 32000)),
        "Llama 70B": predicted(results["by_shape"], llama_shapes(8192, 28672, 1024, 80, 32000)),
    }
    made = None
    with tempfile.TemporaryDirectory() as root:
        for layers, processes, threads in cases:
            source = Path(root) / "model"
            if made != layers:
                shutil.rmtree(source, ignore_errors=True)
                size, made = make_checkpoint(source, layers), layers
            row = {"layers": layers, "gb": size / 1e9, "processes": processes, "threads": threads}
            shapes = llama_shapes(2048, 5632, 256, layers, VOCABULARY)
            row["predicted_s"] = predicted(results["by_shape"], shapes)
            results["checkpoints"].append({**row, **compress(source, processes, threads)})
            print(results["checkpoints"][-1], flush=True)
    if not args.quick:
        write("large", results, markdown(results))
    else:
        print(markdown(results))


if __name__ == "__main__":
    main()
