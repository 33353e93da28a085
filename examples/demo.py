"""Compress the pretrained CREPE pitch network to half its size, and deploy it: quality, latency, time, a picture."""

import argparse
import time
from pathlib import Path

import crepe
import torch

import alds_fast as alds


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

    file = args.out / "small.safetensors"
    alds.save(small, file)
    loaded = alds.load(file, lambda: crepe.build(args.capacity))
    frames, cents = crepe.tones(args.tones, seed=0)
    with torch.inference_mode():
        print(f"loaded model bit-equal to the saved one: {torch.equal(loaded(frames[:8]), small(frames[:8]))}")
    begin = time.perf_counter()
    deployed, table = alds.deploy(loaded, frames[:32], rounds=3, report=True)
    print(f"\n{table}\ndeploy {time.perf_counter() - begin:.2f} s")

    def within_50_cents(model: torch.nn.Module) -> float:
        return crepe.accuracy(model, frames, cents)

    models = {"compressed": loaded, "deployed": deployed}
    report = alds.report(model, models, frames[:32], evaluate=within_50_cents, rounds=args.rounds)
    print(f"\nCREPE-{args.capacity}, runs of 32 frames; quality: share of {args.tones} tones within 50 cents\n{report}")
    alds.plot_plan(analysis, plan, args.out / "spectra.png")
    report.save(args.out / "report.png")
    print(f"\nwrote {args.out}/spectra.png, report.png and small.safetensors")


if __name__ == "__main__":
    main()
