"""Whole models in the GPU suite: a ResNet-50 and a ViT-B, compressed to half their operations and deployed."""

from __future__ import annotations

import copy
import functools
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import alds_fast as alds
from alds_fast import bench
from alds_fast.bench import BenchSettings, check_device, compiled
from alds_fast.errors import BackendError
from alds_fast.layers import LowRankLayer
from alds_fast.measurement import Prepared, prepare
from benchmarks.common.networks import resnet50, with_falling_spectrum

Result = dict[str, Any]


class Attention(nn.Module):
    """Self-attention with query, key and value layers of their own."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q, self.k, self.v, self.out = (nn.Linear(width, width) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (layer(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for layer in (self.q, self.k, self.v))
        return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Block(nn.Module):
    """Attention and a two-layer perceptron, each behind a normalisation and beside a shortcut."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1, self.norm2, self.attention = nn.LayerNorm(width), nn.LayerNorm(width), Attention(width, heads)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class ViT(nn.Module):
    """A vision transformer (Dosovitskiy et al. 2020); the default sizes are those of ViT-B/16 for 224 x 224."""

    def __init__(self, width: int = 768, depth: int = 12, heads: int = 12, side: int = 224, patch: int = 16) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, width, patch, patch)
        self.token = nn.Parameter(0.02 * torch.randn(1, 1, width))
        self.position = nn.Parameter(0.02 * torch.randn(1, (side // patch) ** 2 + 1, width))
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(depth)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 1000)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(x.shape[0], -1, -1), x], 1) + self.position
        return self.head(self.norm(self.blocks(x))[:, 0])


def vit(seed: int = 0, **sizes: int) -> nn.Module:
    """With random weights of decaying spectra."""
    torch.manual_seed(seed)
    model = ViT(**sizes)
    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            with_falling_spectrum(module)
    return model.eval()


MODELS: dict[str, tuple[Callable[[], nn.Module], int]] = {  # and the side of its images
    "resnet50": (resnet50, 224),
    "vit-b": (vit, 224),
    "tiny-resnet": (functools.partial(resnet50, blocks=(1, 1)), 32),
    "tiny-vit": (functools.partial(vit, width=64, depth=2, heads=2, side=32), 32),
}


@functools.cache
def compressed(name: str) -> tuple[nn.Module, nn.Module, dict[str, Any]]:
    """The dense model, the one with half the operations, both float32 on the CPU, and what the plan says."""
    build, side = MODELS[name]
    model, begin = build(), time.perf_counter()
    analysis = alds.analyze(model, schemes=(0, 3), groups=(1, 2, 4))
    plan = analysis.plan(flops=0.5, example_inputs=torch.randn(1, 3, side, side), align=16)
    small = plan.apply(model)
    layers = [row for row in plan.layers if row.rank is not None]
    about = {"params_kept": plan.keep_ratio, "largest_error": plan.error, "factorised": len(layers)}
    return model, small, about | {"layers": len(plan.layers), "plan_s": time.perf_counter() - begin}


def on_device(model: nn.Module, options: BenchSettings) -> nn.Module:
    """A copy in bf16 (float32 on the CPU), channels last, on the device."""
    dtype = torch.bfloat16 if options.cuda else torch.float32
    return copy.deepcopy(model).to(options.device, dtype).to(memory_format=torch.channels_last).eval()


def forced(small: nn.Module, backend: str, x: Tensor) -> nn.Module:
    """A copy whose layers run as "two-op", or "fused" where they can be."""
    model = copy.deepcopy(small)
    layers = [m for m in model.modules() if isinstance(m, LowRankLayer)]
    for layer in layers:
        layer.backend = "two-op"
    if backend == "fused":
        hooks = [m.register_forward_pre_hook(_fuse) for m in layers]
        model(x)
        for hook in hooks:
            hook.remove()
        if not any(layer.backend == "fused" for layer in layers):
            raise BackendError(f"no layer can run fused: {layers[0].why_not_fused(x) if layers else 'there is none'}")
    return model


def _fuse(layer: nn.Module, args: tuple[Tensor, ...]) -> None:
    layer.backend = "two-op" if layer.why_not_fused(args[0]) else "fused"


def deployed(small: nn.Module, x: Tensor, tune: bool, result: Result) -> nn.Module:
    """What alds_fast.deploy keeps; its table goes to the result."""
    begin = time.perf_counter()
    model, table = alds.deploy(small, x, report=True, tune=tune)
    result["deploy"] = {"model_ms": dict(table.model_ms), "table": str(table), "seconds": time.perf_counter() - begin,
                        "tuned": tune}  # fmt: skip
    return model


def memory(model: nn.Module, x: Tensor, options: BenchSettings) -> dict[str, int | None]:
    """Bytes of the weights, of everything a run adds at its peak, and both with the input (CUDA only)."""
    weights = sum(t.numel() * t.element_size() for t in [*model.parameters(), *model.buffers()])
    if not options.cuda:
        return {"weights_bytes": weights, "run_bytes": None, "peak_bytes": None}
    model(x)  # chooses algorithms, whose trials take memory of their own
    torch.cuda.synchronize()
    bench.release(options.device)
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    model(x)
    torch.cuda.synchronize()
    run = torch.cuda.max_memory_allocated() - before
    return {"weights_bytes": weights, "run_bytes": run, "peak_bytes": weights + run + x.numel() * x.element_size()}


def output_error(model: nn.Module, reference: nn.Module, x: Tensor) -> float:
    """Relative error of the first outputs against the same rounded factors in float64."""
    some = x[:4]
    exact = reference(some.double())
    return float((model(some).double() - exact).norm() / exact.norm())


class EndToEnd:
    """One model at one batch size: ``result`` fills up step by step, and ``save`` is called after each."""

    def __init__(self, name: str, batch: int, options: BenchSettings, save: Callable[[Result], None], deadline: float,
                 tune: bool) -> None:  # fmt: skip
        self.tune = tune
        self.name, self.batch, self.options, self.save, self.deadline = name, batch, options, save, deadline
        self.result: Result = {"model": name, "batch": batch, "dtype": "bfloat16" if options.cuda else "float32"}
        self.result |= {"sides": {}, "ratios": {}, "memory": {}, "errors": {}, "reasons": {}, "seconds": {}}
        self.result["compile_mode"] = next(iter(options.model_mode.values()))
        self.models: dict[str, nn.Module] = {}
        self.ready: dict[str, Prepared] = {}

    def attempt(self, name: str, step: Callable[[], object]) -> None:
        """Run a step; what it raises is noted, and the others go on. Raises DeviceLost."""
        begin = time.perf_counter()
        try:
            step()
        except Exception as e:
            self.result["reasons"][name] = bench.error_text(e)
            check_device(self.options.device, e)
        self.result["seconds"][name] = time.perf_counter() - begin
        self.save(self.result)
        print(f"    {name}: {self.result['seconds'][name]:.1f} s {self.result['reasons'].get(name, '')}", flush=True)

    @torch.no_grad()
    def run(self) -> Result:
        dense, small, about = compressed(self.name)
        self.result["plan"] = about
        side = MODELS[self.name][1]
        generator = torch.Generator(self.options.device).manual_seed(0)
        x = torch.randn(self.batch, 3, side, side, device=self.options.device, generator=generator)
        x = x.to(torch.bfloat16 if self.options.cuda else torch.float32).contiguous(memory_format=torch.channels_last)
        ours = on_device(small, self.options)
        build: dict[str, Callable[[], nn.Module]] = {
            "dense": lambda: on_device(dense, self.options),
            "two_op": lambda: forced(ours, "two-op", x),
            "fused": lambda: forced(ours, "fused", x),
            "deployed": lambda: deployed(ours, x, self.tune, self.result),
        }
        for name, make in build.items():
            self.attempt(name, lambda name=name, make=make: self.models.update({name: make()}))
        self.attempt("reference", lambda: self.check(small, x))
        for name, model in self.models.items():
            step = f"{name} memory"
            self.attempt(step, lambda n=name, m=model: self.result["memory"].update({n: memory(m, x, self.options)}))
        for name, model in self.models.items():
            self.attempt(f"{name} graph", lambda n=name, m=model: self.prepare(n, m, x))
        self.attempt("timing", lambda: self.time(x))
        for name in ("dense", "deployed"):
            self.attempt(f"{name}_compiled", lambda n=name: self.compile(n, x))
        self.attempt("timing compiled", lambda: self.time(x))
        return self.result

    def check(self, small: nn.Module, x: Tensor) -> None:
        """Errors of all but the dense model, which computes something else."""
        reference = forced(on_device(small, self.options).double(), "two-op", x[:4].double())
        for name in self.models.keys() - {"dense"}:
            self.result["errors"][name] = output_error(self.models[name], reference, x)

    def prepare(self, name: str, model: Callable[[Tensor], Tensor], x: Tensor) -> None:
        self.ready[name] = prepare(model, [x], self.options.device)

    def compile(self, name: str, x: Tensor) -> None:
        if name not in self.models:
            raise RuntimeError(f"there is no {name} model")
        if time.time() > self.deadline:
            raise TimeoutError("no time left to compile")
        self.prepare(f"{name}_compiled", compiled(self.models[name], self.options.model_mode), x)

    def time(self, x: Tensor) -> None:
        """All sides that are ready take turns, and dense and deployed without a graph as well."""
        sides = dict(self.ready)
        for name in {"dense", "deployed"} & self.models.keys():
            sides[f"{name}_eager"] = Prepared(lambda m=self.models[name]: m(x), [], 1)
        rounds = self.options.rounds
        self.result["sides"] = bench.interleaved(sides, self.options.device, rounds, 5 * self.options.min_ms)
        self.result["ratios"] = ratios({name: t["ms"] for name, t in self.result["sides"].items()})


def ratios(ms: dict[str, float]) -> dict[str, float]:
    """Times faster than the dense model in the same way of running."""
    pairs = {
        "deployed": ("dense", "deployed"), "two_op": ("dense", "two_op"), "fused": ("dense", "fused"),
        "deployed_eager": ("dense_eager", "deployed_eager"),
        "deployed_compiled": ("dense_compiled", "deployed_compiled"),
        "deployed_against_compiled_dense": ("dense_compiled", "deployed"),
    }  # fmt: skip
    return {name: ms[a] / ms[b] for name, (a, b) in pairs.items() if a in ms and b in ms}
