"""Compress the pretrained CREPE pitch network to half its size, and deploy it: quality, latency, time, a picture."""

import argparse
import statistics
import time
from pathlib import Path

import crepe
import torch

import alds_fast as alds


@torch.inference_mode()
def latencies_ms(models: list[torch.nn.Module], frames: torch.Tensor, rounds: int) -> list[float]:
    """Median milliseconds of one batch, the models taking turns so that a busy machine is busy for all of them."""
    times = [[] for _ in models]
    for turn in range(rounds + 1):
        for model, ms in zip(models, times, strict=True):
            begin = time.perf_counter()
            model(frames)
            if turn:
                ms.append((time.perf_counter() - begin) * 1e3)
    return [statistics.median(ms) for ms in times]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--capacity", choices=("full", "tiny"), default="full")
    parser.add_argument("--params", type=float, default=0.5)
    parser.add_argument("--tones", type=int, default=800)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--out", type=Path, default=Path("demo_output"))
    args = parser.parse_args()
    args.out.mkdir(exist_ok=True)
    model = crepe.pretrained(args.capacity)

    begin = time.perf_counter()
    analysis = alds.analyze(model)
    analysed = time.perf_counter()
    plan = analysis.plan(params=args.params)
    small = plan.apply(model)
    done = time.perf_counter()
    print(plan)
    print(f"analysis {analysed - begin:.2f} s, plan and factors {done - analysed:.2f} s")

    files = {name: args.out / f"{name}.safetensors" for name in ("dense", "small")}
    alds.save(small, files["small"])
    alds.save(analysis.plan(params=1.0).apply(model), files["dense"])
    loaded = alds.load(files["small"], lambda: crepe.build(args.capacity))
    frames, cents = crepe.tones(args.tones, seed=0)
    with torch.inference_mode():
        print(f"loaded model bit-equal to the saved one: {torch.equal(loaded(frames[:8]), small(frames[:8]))}")
    begin = time.perf_counter()
    deployed, table = alds.deploy(loaded, frames[:32], rounds=3, report=True)
    print(f"\n{table}\ndeploy {time.perf_counter() - begin:.2f} s")
    dense_ms, small_ms, deployed_ms = latencies_ms([model, loaded, deployed], frames[:32], args.rounds)
    quality = [crepe.accuracy(m, frames, cents) for m in (model, loaded)]
    sizes = [path.stat().st_size / 1e6 for path in files.values()]

    print(f"\n{'CREPE-' + args.capacity:<34}{'dense':>12}{'compressed':>12}{'ratio':>9}")
    before, after = plan.params_before, plan.params
    print(f"{'parameters':<34}{before:>12,}{after:>12,}{after / before:>9.3f}")
    print(f"{'file, MB':<34}{sizes[0]:>12.1f}{sizes[1]:>12.1f}{sizes[1] / sizes[0]:>9.3f}")
    label, change = f"within 50 cents, {args.tones} tones", quality[1] - quality[0]
    print(f"{label:<34}{quality[0]:>12.4f}{quality[1]:>12.4f}{change:>+9.4f}")
    where = f"CPU ms, 32 frames, {torch.get_num_threads()} threads"
    print(f"{where:<34}{dense_ms:>12.1f}{small_ms:>12.1f}{dense_ms / small_ms:>8.2f}x")
    print(f"{'the same, deployed':<34}{dense_ms:>12.1f}{deployed_ms:>12.1f}{dense_ms / deployed_ms:>8.2f}x")
    alds.plot_plan(analysis, plan, args.out / "spectra.png")
    print(f"\nwrote {args.out}/spectra.png, {files['small']}")


if __name__ == "__main__":
    main()
