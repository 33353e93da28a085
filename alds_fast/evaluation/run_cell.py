"""Runs the cells of an evaluation one by one, keeping what they share."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from ..errors import AldsError, ArgumentError, BudgetError, ModelError
from ..layers import count_params
from ..measurement import count_inputs, inference
from ..planning import Analysis, analyze
from ..version import __version__
from .cells import Cell, Task, model_mark
from .log import Record
from .variants import DENSE, Variant

DONE, UNMET, FAILED = "done", "cannot be met", "failed"
NUMBERS = ("params", "flops", "error", "quality", "quality_after")
SECONDS = ("seconds_analyze", "seconds_plan", "seconds_apply", "seconds_after", "seconds_quality")


@contextmanager
def _with_seed(seed: int) -> Iterator[None]:
    """torch's random numbers start from the seed, and go on afterwards as if nothing had been drawn."""
    with torch.random.fork_rng(range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()):
        torch.manual_seed(seed)
        yield


class _Clock:
    """Seconds of the parts of a cell."""

    def __init__(self, record: Record) -> None:
        self.record = record

    def __call__(self, part: str, work: Callable[[], Any]) -> Any:
        begin = time.perf_counter()
        try:
            return work()
        finally:
            name = f"seconds_{part}"
            self.record[name] = (self.record[name] or 0.0) + time.perf_counter() - begin


def _module(value: Any, source: str) -> nn.Module:
    if not isinstance(value, nn.Module):
        raise ModelError(f"{source} returned a {type(value).__name__}, not a torch.nn.Module")
    return value


class Runner:
    """Keeps the model of the latest seed, and its analyses by their options."""

    def __init__(self, task: Task) -> None:
        self.task = task
        self.seed: int | None = None
        self.built: nn.Module | None = None
        self.mark = ""
        self.dense_flops = 0
        self.analyses: dict[str, tuple[Analysis, float]] = {}

    def model(self, seed: int) -> nn.Module:
        """The dense model of a seed, and what it is known by in ``mark``."""
        fixed = isinstance(self.task.model, nn.Module)
        if self.built is None or (self.seed != seed and not fixed):
            self.analyses.clear()
            self.built = None  # free it before the next one is built
            self.built = _module(self.task.model if fixed else self.task.model(seed), "model")
            self.mark = model_mark(self.built)
            self.dense_flops = self._flops(self.built)
        if self.seed != seed and self.task.data is not None:
            self.analyses.clear()
        self.seed = seed
        return self.built

    def mark_of(self, seed: int) -> str:
        """What a seed's model is known by."""
        with _with_seed(seed):
            self.model(seed)
        return self.mark

    def run(self, cell: Cell) -> tuple[Record, str, Exception | None]:
        """What came out, the model's mark, and the exception if the cell failed for anything but its budget."""
        record: Record = {"variant": cell.variant, "share": cell.share, "seed": cell.seed, "key": self.task.key(cell)}
        planning = self.task.variants[cell.variant].planning if cell.variant != DENSE else {}
        record |= {"status": DONE, "message": "", **{n: planning.get(n) for n in ("method", "criterion", "p")}}
        record |= dict.fromkeys((*NUMBERS, *SECONDS))
        record |= {"torch": torch.__version__, "alds_fast": __version__}
        failure: Exception | None = None
        with _with_seed(cell.seed):
            dense = self.model(cell.seed)
        try:
            with _with_seed(cell.seed):
                self._fill(record, cell, dense)
        except BudgetError as e:
            record |= {"status": UNMET, "message": str(e)}
        except Exception as e:
            text = str(e) if isinstance(e, AldsError) else f"{type(e).__name__}: {e}"
            record |= {"status": FAILED, "message": text}
            failure = e
        return record, self.mark, failure

    def _fill(self, record: Record, cell: Cell, dense: nn.Module) -> None:
        clock = _Clock(record)
        small = dense if cell.variant == DENSE else self._small(record, cell, dense, clock)
        record["params"] = count_params(small) / max(count_params(dense), 1)
        if self.dense_flops:
            record["flops"] = (self.dense_flops if small is dense else self._flops(small)) / self.dense_flops
        record["quality"] = clock("quality", lambda: self._quality(small))
        after = self.task.after
        if after is not None and cell.variant != DENSE:
            trained = clock("after", lambda: _module(after(small, cell.seed), "after"))
            record["quality_after"] = clock("quality", lambda: self._quality(trained))

    def _small(self, record: Record, cell: Cell, dense: nn.Module, clock: _Clock) -> nn.Module:
        variant = self.task.variants[cell.variant]
        if variant.build is not None:
            build = variant.build
            return _module(
                clock("apply", lambda: build(copy.deepcopy(dense), cell.share, cell.seed)), repr(variant.name)
            )
        analysis, record["seconds_analyze"] = self._analysis(variant, dense, cell.seed)
        budget: dict[str, Any] = {self.task.kind: cell.share}
        if self.task.kind != "params":
            budget["example_inputs"] = self.task.example_inputs
        plan = clock("plan", lambda: analysis.plan(**budget, **variant.planning, progress=False))
        record["error"] = None if math.isnan(plan.error) else plan.error
        record |= {"criterion": plan.criterion, "p": plan.p}  # what None stood for
        batches = self._batches(cell.seed) if variant.refit or variant.refine else None
        fitted: dict[str, Any] = {"refit": batches} if variant.refit else {}
        fitted |= {"refine": batches, "epochs": variant.refine} if variant.refine else {}
        fitted |= {"mask": variant.analysis["mask"]} if fitted else {}
        small: nn.Module = clock("apply", lambda: plan.apply(dense, **fitted, progress=False))
        return small

    def _batches(self, seed: int) -> Any:
        """The data of a seed, in a list if they can be used once only."""
        assert self.task.data is not None
        batches = self.task.data(seed)
        return list(batches) if isinstance(batches, Iterator) else batches

    def _analysis(self, variant: Variant, dense: nn.Module, seed: int) -> tuple[Analysis, float]:
        """The analysis with the variant's options, and the seconds it took; made once for all cells of a seed."""
        key = repr(sorted(variant.analysis.items())) + str(variant.data)
        if key not in self.analyses:
            options = dict(variant.analysis)
            if variant.data:
                options["data"] = self._batches(seed)
            begin = time.perf_counter()
            analysis = analyze(dense, **options, progress=False)
            self.analyses[key] = analysis, time.perf_counter() - begin
        return self.analyses[key]

    def _quality(self, model: nn.Module) -> float:
        with inference(model):
            value = float(self.task.quality(model))
        if not math.isfinite(value):
            raise ArgumentError(f"quality returned {value}; return a finite number, higher is better")
        return value

    def _flops(self, model: nn.Module) -> int:
        return 0 if self.task.example_inputs is None else count_inputs(model, self.task.example_inputs, ())[1]
