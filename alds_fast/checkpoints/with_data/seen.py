"""Plan and factors of a checkpoint directory by what its layers see: stages, each begun where it was left."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

from torch import nn

from ...blocks import BlockChain
from ...criteria import MAX_DATA_GROUPS, Basis, LayerSpectra
from ...errors import ArgumentError, FileFormatError, PlanError
from ...factors import BATCHNORMS, NarrowMoments
from ...files import write_whole
from ...layers import Layer, as_narrowed, count_params, decomposable, is_linear, label, reader_reason
from ...measurement import Sensitivity, weight_readers
from ...planning import Analysis, Plan
from ..pretrained import PLAN
from ..streaming.journal import WIDE
from ..streaming.output_files import Replacement
from ..streaming.spectra_and_plan import find_spectra
from ..streaming.stored_spectra import spectra_of
from ..streaming.streamed_model import Work
from .calibration import check_one_process, collect, tried_chain
from .factors import draft_factors, put_final, refit_factors
from .mapped import as_computed, let_weights_go, load_mapped, runs
from .narrowing import load_narrow, narrow_groups, put_biases
from .needs import tell_needs
from .offloading import on_device
from .refining import refine_factors
from .stored_moments import StoredMoments


class WithData:
    """The model of a checkpoint directory, and what its layers see of batches; loaded and run when asked for."""

    def __init__(self, work: Work, batches: Sequence[Any], sensitivity: Sensitivity) -> None:
        if len(batches) < work.world.size:
            raise ArgumentError(
                f"data= has {len(batches)} batches for {work.world.size} processes, of which each takes one at least: "
                f"pass smaller ones, or start fewer processes"
            )
        self.work, self.batches, self.sensitivity = work, on_device(batches, work.device), sensitivity
        tell_needs(work, batches, bool(sensitivity))
        self.plan: Plan | None = None  # that was made here, with what it was made from

    @cached_property
    def model(self) -> nn.Module:
        """The dense model, mapped."""
        model = as_computed(self.work, load_mapped(self.work.shards), WIDE)
        if self.work.settings.refit and any(isinstance(m, BATCHNORMS) for m in model.modules()):
            raise ArgumentError(
                f"refit= moves statistics of BatchNorms, of which {type(model).__name__} has some, and to a directory "
                f"only factors are written: leave out refit=, or load the model and use compress(refit=True)"
            )
        return model

    @cached_property
    def chain(self) -> BlockChain:
        """Its blocks, or why it has none."""
        return tried_chain(self.work, self.model, self.batches)

    @cached_property
    def layers(self) -> list[Layer]:
        """Those of the directory with their weights, but for those whose weights the model uses itself."""
        layers = [dataclasses.replace(layer, module=self.model.get_submodule(layer.name)) for layer in self.work.layers]
        modules = {layer.name: layer.module for layer in decomposable(layers)}
        with runs(self.work, self.model):
            readers = weight_readers(self.model, modules, self.batches[0], "batch 1 of data=")
        return [
            layer.left_out(reader_reason(readers[layer.name])) if layer.name in readers else layer for layer in layers
        ]

    @cached_property
    def moments(self) -> StoredMoments:
        """Of all layers, in the journal."""
        layers = {layer.name: layer for layer in decomposable(self.layers)}
        store = StoredMoments(self.work.journal, layers, bool(self.sensitivity), self._let_go)
        complete = store.complete
        self.work.world.together()
        if not complete:
            collect(self.work, self.model, self.chain, self.batches, list(layers.values()), self.sensitivity, store)
            self.work.world.together()
        return store

    def _check_shared(self) -> None:
        """ArgumentError, ModelError for what several processes cannot share."""
        if self.work.world.size == 1:
            return
        other = next((layer for layer in decomposable(self.layers) if not is_linear(layer.module)), None)
        if other is not None:
            raise ArgumentError(
                f"layer {label(other.name)} is a {other.kind}, and how many of its patches are drawn depends on the "
                f"batches before, which {self.work.world.size} processes do not see: leave out torchrun, or the layer "
                f"with exclude={[other.name]!r}"
            )
        check_one_process(self.work, self.chain)

    def _let_go(self) -> None:
        let_weights_go(self.work)

    @property
    def _analysis(self) -> Analysis:
        work, layers = self.work, self.layers
        self._check_shared()
        find_spectra(work)
        ready = {layer.name: layer for layer in decomposable(layers)}
        spectra: dict[str, LayerSpectra] = {}
        for number, layer in work.ready.items():
            if layer.name in ready:
                spectra[layer.name] = dataclasses.replace(spectra_of(work, number)[0], layer=ready[layer.name])
        most = MAX_DATA_GROUPS if work.settings.groups == "divisors" else None
        moments: Any = self.moments  # a mapping
        parts = tuple(layers), spectra, count_params(self.model), self.model, moments, most
        return Analysis(*parts, world=work.world, inputs=self.batches[0])

    def find_plan(self) -> Plan:
        """The plan, out of the journal where it is there."""
        path, s, world = self.work.journal.folder / PLAN, self.work.settings, self.work.world
        known = path.exists()
        world.together()
        if not known:
            options: dict[str, Any] = {**s.budget, "criterion": s.criterion, "p": s.p, "align": s.align, **s.pinned}
            self.work.progress("plan", 0, 1)
            options |= {"pivots": s.pivots, "hidden_units": bool(s.hidden_units), "bias_correction": False}
            with runs(self.work, self.model):
                self.plan = self._analysis.plan(**options, progress=False)
            text = world.told_by(0, self.plan.to_json() if world.first else None)
            if world.first:
                write_whole(path, [text.encode()])
            else:  # that of another machine may be another in ties
                self.plan = dataclasses.replace(Plan.from_json(text), basis=self.plan.basis)
            world.together()
            self.work.progress("plan", 1, 1)
            return self.plan
        try:
            return Plan.from_json(path.read_text())
        except (PlanError, ValueError) as e:
            raise FileFormatError(f"{str(path)!r} is damaged ({e}); remove it and run the same command again") from e

    def find_factors(self, plan: Plan, choices: Mapping[int, Replacement], todo: list[int]) -> None:
        """The factors of some of the layers that are factorised, by number, in the journal."""
        work, layers = self.work, {layer.name: layer for layer in decomposable(self.layers)}
        basis = plan.basis if plan is self.plan and plan.basis else Basis(plan.criterion, self.moments, False)
        if plan.hidden_units:
            narrow_groups(work, plan, basis, layers)
            narrow = load_narrow(work, plan)
            names = {name for units in plan.hidden_units for name in units.layers}
            modules: dict[str, Any] = {name: narrow.get_submodule(name) for name in names}
            layers |= {name: as_narrowed(layers[name], module) for name, module in modules.items()}
            basis = basis.of_parts(NarrowMoments(basis.moments, plan.hidden_units), names)
        draft_factors(work, plan, basis, layers, choices)
        if work.settings.refit:
            refit_factors(work, self.model, self.chain, self.batches, plan, basis, layers, choices)
        refined: dict[str, Any] = {}
        others: dict[str, Any] = {}
        own = work.share(todo)
        if work.settings.refine:  # steps one after the other, by one process
            own = todo if work.world.first else []
        if work.settings.refine and work.world.first:
            seen = self.model, self.chain, self.batches, plan, choices
            refined, others = refine_factors(work, *seen, work.settings.refine)
        put_biases(work, plan, others)
        for number in own:
            put_final(work, number, choices[number], refined)
        work.world.together()
