"""Plan and factors of a checkpoint directory by what its layers see.

The dense model is run as it is: transformers maps its weights out of the files, so that the system reads them when they
are used and forgets them when memory is short. Moments and low-rank layers are in memory.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import nn

from ...errors import ArgumentError, FileFormatError, ModelError, PlanError
from ...factors import BATCHNORMS, Choice
from ...files import crc32, write_whole
from ...layers import chosen_layers, decomposable
from ...measurement import Sensitivity
from ...planning import Analysis, Plan, analyze
from ..pretrained import class_of
from ..safetensors_reader import DTYPES
from .journal import PLAN
from .streamed_model import Work

ONE_SLICE = (1,)  # what groups="auto" stands for with data


class WithData:
    """The model of a checkpoint directory, and what its layers see of batches; loaded and run when asked for."""

    def __init__(self, work: Work, batches: Sequence[Any], sensitivity: Sensitivity, refit: bool) -> None:
        if work.world.size > 1:
            raise ArgumentError(
                f"data= with {work.world.size} processes: a checkpoint directory is compressed with data in one; leave "
                f"out torchrun"
            )
        self.work, self.batches, self.sensitivity, self.refit = work, batches, sensitivity, refit
        self.plan: Plan | None = None  # that was made here, with what it was made from

    @cached_property
    def model(self) -> nn.Module:
        """The dense model, in the type that it is stored in; half precision on a CPU as float32."""
        shards, cls = self.work.shards, class_of(self.work.shards.config)
        fixed = {"dtype": "auto", "local_files_only": True, "trust_remote_code": False}
        try:
            model: nn.Module = cls.from_pretrained(shards.folder, **fixed)
        except Exception as e:
            raise ModelError(f"transformers cannot load {str(shards.folder)!r}: {type(e).__name__}: {e}") from e
        config: Any = model.config
        config.use_cache = False
        if self.work.device.type == "cpu" and any(p.dtype == torch.float16 for p in model.parameters()):
            model = model.float()
        if self.refit and any(isinstance(m, BATCHNORMS) for m in model.modules()):
            raise ArgumentError(
                f"refit= moves statistics of BatchNorms, of which {cls.__name__} has some, and to a directory only "
                f"factors are written: leave out refit=, or load the model and use compress(refit=True)"
            )
        return model.to(self.work.device)

    @cached_property
    def analysis(self) -> Analysis:
        """Of the layers that can be streamed."""
        s, streamed = self.work.settings, {layer.name for layer in self.work.ready.values()}
        chosen = decomposable(chosen_layers(self.model, s.include, s.exclude))
        exclude = [*(s.exclude or ()), *(layer.name for layer in chosen if layer.name not in streamed)]
        groups = ONE_SLICE if s.groups is None else s.groups
        return analyze(
            self.model, schemes=s.schemes, groups=groups, include=s.include, exclude=exclude or None,
            data=self.batches, sensitivity=self.sensitivity, progress=self.work.progress,
        )  # fmt: skip

    def find_plan(self) -> Plan:
        """The plan, out of the journal where it is there."""
        path, s = self.work.journal.folder / PLAN, self.work.settings
        if not path.exists():
            options: dict[str, Any] = {**s.budget, "criterion": s.criterion, "p": s.p, "align": s.align}
            self.plan = self.analysis.plan(**options, bias_correction=False, pivots=s.pivots)
            write_whole(path, [self.plan.to_json().encode()])
            return self.plan
        try:
            return Plan.from_json(path.read_text())
        except (PlanError, ValueError) as e:
            raise FileFormatError(f"{str(path)!r} is damaged ({e}); remove it and run the same command again") from e

    def find_factors(self, plan: Plan, choices: Mapping[int, Choice]) -> None:
        """The factors of these layers, in the journal."""
        work, data = self.work, self.batches if self.refit else None
        known: Any = {} if plan is self.plan else {"moments": self.analysis.moments}  # which its plan has
        small = plan.apply(self.model, **known, refit=data, example_inputs=self.batches[0])
        reports: dict[str, Any] = getattr(small, "alds_factors", {})
        for number, choice in choices.items():
            low: Any = small.get_submodule(choice.name)
            dtype = DTYPES[work.shards.tensors[work.sources[choice.name]].dtype]
            tensors = {name: getattr(low, name).detach().to("cpu", dtype) for name in ("encoder", "decoder")}
            tensors |= {"order": low.order.cpu()} if low.pivots else {}
            report = reports[choice.name]
            fields = {"method": report.method, "iterations": report.iterations, "error": report.error}
            fields |= {f"crc32.{name}": crc32(tensor) for name, tensor in tensors.items()}
            work.journal.put("report", number, {}, fields)
            work.journal.put("factors", number, tensors, {})
