"""What becomes of one architecture: compressed, run, saved, loaded, compared, exported."""

from __future__ import annotations

import re
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten

import alds_fast as alds
from alds_fast.errors import BudgetError
from alds_fast.measurement import call_model

from .case import Case

SHARE = 0.5
_T = TypeVar("_T")


class Failed(Exception):
    """A step after which the rest cannot be done."""


class Trial:
    """One architecture. ``row`` has what was found, also where a step fails; ``tell`` gets it before every step."""

    def __init__(self, case: Case, tell: Callable[[dict[str, Any]], object] = len, export: bool = True) -> None:
        self.row: dict[str, Any] = {"name": case.name}
        self.case, self.tell, self.export = case, tell, export

    def _step(self, name: str, call: Callable[[], _T]) -> _T:
        """What the call gives; its CPU-seconds are kept."""
        self.row["step"], began = name, time.process_time()
        self.tell(self.row)
        try:
            result = call()
        except Exception as e:
            self.row["failed"] = f"{name}: {type(e).__name__}: {e}"
            raise Failed(self.row["failed"]) from e
        self.row.setdefault("seconds", {})[name] = round(time.process_time() - began, 3)
        return result

    def run(self) -> dict[str, Any]:
        """All steps, until one fails."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of a budget that leaves little of random weights
            try:
                self._run()
                del self.row["step"]
            except Failed:
                pass
        self.tell(self.row)
        return self.row

    def _run(self) -> None:
        torch.manual_seed(0)
        model = self._step("build", lambda: self.case.build().eval())
        inputs = self.case.inputs()
        dense = self._step("run dense", lambda: outputs(model, inputs))
        analysis = self._step("analyze", lambda: alds.analyze(model, precision="float32", progress=False))
        self.row |= described(analysis)
        plan = self._step("plan", lambda: self._plan(analysis))
        self.row |= {"asked": plan.budgets["params"], "kept": plan.keep_ratio}
        self.row["low_rank"] = sum(row.choice is not None for row in plan.layers)
        small = self._step("apply", lambda: plan.apply(model, progress=False))
        compressed = self._step("run", lambda: outputs(small, inputs))
        self._step("look at outputs", lambda: check_outputs(compressed, dense))
        loaded = self._step("save and load", lambda: saved_and_loaded(small, model))
        self._step("compare", lambda: check_equal(outputs(loaded, inputs), compressed))
        if not self.export:
            return
        try:
            exported(model, inputs)
        except Exception as e:
            self.row["export"] = f"the dense model is not exported: {first_line(e)}"
            return
        program = self._step("export", lambda: exported(small, inputs))
        self._step("run exported", lambda: check_close(outputs(program.module(), inputs), compressed))
        self.row["export"] = "yes"

    def _plan(self, analysis: alds.Analysis) -> alds.Plan:
        """At the share, or at the smallest one that the refusal names."""
        try:
            return analysis.plan(params=SHARE, progress=False)
        except BudgetError as e:
            least = re.search(r"smallest reachable is params=([\d.]+)", str(e))
            if least is None:
                raise
            return analysis.plan(params=float(least[1].rstrip(".")), progress=False)


def described(analysis: alds.Analysis) -> dict[str, Any]:
    """Parameters, the share of them in weights that can be decomposed, and what is left out by its reason."""
    left_out: dict[str, dict[str, int]] = {}
    for layer in analysis.layers:
        if layer.reason is not None:
            counts = left_out.setdefault(f"{layer.kind}: {layer.reason}", {"layers": 0, "params": 0})
            counts["layers"] += 1
            counts["params"] += layer.params
    ready = [layer for layer in analysis.layers if layer.reason is None]
    eligible = sum(layer.stored for layer in ready) / analysis.params
    return {"params": analysis.params, "layers": len(ready), "eligible": eligible, "left_out": left_out}


def outputs(model: nn.Module, inputs: Any) -> list[Tensor]:
    """The tensors of what the model returns."""
    torch.manual_seed(0)
    with torch.no_grad():
        leaves, _ = tree_flatten(call_model(model, inputs))
    return [leaf for leaf in leaves if isinstance(leaf, Tensor)]


def check_outputs(small: list[Tensor], dense: list[Tensor]) -> None:
    """As many finite tensors, of as many dimensions (a detector finds other boxes)."""
    if [t.dim() for t in small] != [t.dim() for t in dense] or not small:
        raise AssertionError(f"{len(small)} tensors in the place of {len(dense)}")
    if not all(t.isfinite().all() for t in small if t.is_floating_point()):
        raise AssertionError("an output is not finite")


def saved_and_loaded(small: nn.Module, model: nn.Module) -> nn.Module:
    """What :func:`alds_fast.load` gives of a file that :func:`alds_fast.save` wrote."""
    with tempfile.TemporaryDirectory() as folder:
        alds.save(small, Path(folder) / "small.safetensors")
        return alds.load(Path(folder) / "small.safetensors", model)


def check_equal(these: list[Tensor], those: list[Tensor]) -> None:
    """Bit for bit."""
    if len(these) != len(those) or not all(torch.equal(a, b) for a, b in zip(these, those, strict=True)):
        raise AssertionError("the outputs of the loaded model are others")


def check_close(these: list[Tensor], those: list[Tensor]) -> None:
    """But for rounding: an exported program may call other kernels."""
    torch.testing.assert_close(these, those)


def exported(model: nn.Module, inputs: Any) -> torch.export.ExportedProgram:
    """The model's program for these inputs."""
    positional = () if isinstance(inputs, dict) else inputs if isinstance(inputs, tuple) else (inputs,)
    named = inputs if isinstance(inputs, dict) else {}
    with torch.no_grad():
        return torch.export.export(model, positional, named)


def first_line(error: Exception) -> str:
    """Its type and the first line of its message."""
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"[:200]
