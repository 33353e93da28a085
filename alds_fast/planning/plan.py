"""A plan: for every layer what replaces it, why, and what it costs."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from ..blocks import check_lists
from ..checks import check_model
from ..criteria import CRITERIA, Basis, Moments
from ..errors import ArgumentError, PlanError
from ..factors import PASSES, FewerUnits, NarrowMoments, factorize, narrow_model, rows_kept
from ..integrations import keep_when_saved, warn_of_lost_merging
from ..layers import annotate, check_copyable, count_params, label, opened_for, warn_of_holders
from ..measurement import check_batches, without_labels
from ..progress import ProgressOption, telling
from ..text import ShownInNotebooks
from .fitting import inputs_of_run, refine_steps, refit_steps
from .options import check_refining
from .plan_json import plan_text, read_plan
from .plan_rows import Latency, LayerPlan, Quality, RowsByName, bytes_held
from .plan_texts import costs_lines, diff_text, rows_text
from .result_check import check_result, check_run, check_way, naming_readers, warn_if_changed


@dataclass(frozen=True)
class Plan(RowsByName, ShownInNotebooks):
    """The whole-model allocation; made by :meth:`alds_fast.Analysis.plan`, applied by :meth:`apply`.

    Attributes:
        layers: one :class:`LayerPlan` per layer, those left out included; ``for row in plan`` goes over them.
        params_before: parameters of the dense model, shared ones once.
        budget, criterion, method, p, align: how it was made; ``budget`` as "params=0.5", "params=0.5, flops=0.5" or
            "error=0.3".
        gap: certified relative distance of the p-norm of the errors from its optimum; 0 for method "alds" with p = inf
            under one budget, which is solved exactly, NaN for a plan edited by hand.
        latency: what was measured for a budget on latency; None without one, and for a plan edited by hand.
        bias_correction: where factors are fitted to data, biases take up the means of the errors.
        keeps_constants: convolutions without data keep what they return for a constant input, at a larger error.
        pins, min_rank: what single layers, and all, were held to.
        costs: before and after, "memory", the bytes of parameters and buffers, "activations", those of a run at its
            peak, where a budget on memory had example inputs, and "flops", the operations of a run, where a plan had
            any; empty for a plan edited by hand.
        hidden_units: :class:`alds_fast.factors.FewerUnits` of layers that lose some; rows have the shapes left.
        quality: what was measured for a plan of enough quality; None without, and for a plan edited by hand.
    """

    layers: tuple[LayerPlan, ...]
    params_before: int
    budget: str
    criterion: str
    method: str
    p: float
    align: int
    gap: float
    latency: Latency | None = None
    bias_correction: bool = False
    keeps_constants: bool = False
    pins: dict[str, Any] = field(default_factory=dict)
    min_rank: int = 1
    costs: dict[str, tuple[int, int]] = field(default_factory=dict)
    hidden_units: tuple[FewerUnits, ...] = ()
    quality: Quality | None = None
    spectra: dict[str, Tensor] = field(default_factory=dict, repr=False, compare=False)
    basis: Basis | None = field(default=None, repr=False, compare=False)

    @property
    def params(self) -> int:
        """Parameters of the compressed model, shared ones once."""
        return self.params_before - sum(row.params_before - row.params_after for row in self.layers)

    @property
    def budgets(self) -> dict[str, float]:
        """What was asked for, by name: of "params", "flops", "memory" and "latency", or an "error" or "quality".

        Shares, and above 1 numbers of parameters, of operations and of bytes.
        """
        return {name: float(value) for name, value in (part.split("=") for part in self.budget.split(", "))}

    @property
    def flops(self) -> int | None:
        """Operations of a run of the compressed model; None where they were not counted."""
        return self.costs["flops"][1] if "flops" in self.costs else None

    @property
    def memory(self) -> int | None:
        """Bytes of parameters and buffers and, where ``costs`` has them, of activations; None for an edited plan."""
        sizes = bytes_held(self.costs)
        return None if sizes is None else sizes[1]

    @property
    def keep_ratio(self) -> float:
        """Share of the parameters kept, in (0, 1]."""
        return self.params / self.params_before if self.params_before else 1.0

    @property
    def error(self) -> float:
        """The largest relative error over the layers and their hidden units; NaN if a row was edited by hand."""
        errors = [*(row.error for row in self.layers), *(units.error for units in self.hidden_units)]
        return math.nan if any(map(math.isnan, errors)) else max(errors, default=0.0)

    @property
    def held_out(self) -> float | None:
        """The largest error on samples kept aside, of the plan's own factors before ``refit=``; None without any."""
        return max((row.held_out for row in self.layers if row.held_out is not None), default=None)

    @property
    def exact(self) -> bool:
        """Whether factors must reach the stated errors exactly, so that no sketch may serve."""
        return not CRITERIA[self.criterion].certified or "error" in self.budgets

    def diff(self, other: Plan) -> str:
        """Two plans side by side, as a table: the layers that they treat differently, this plan first, and the totals.

        PlanError for no plan, or one of another model.
        """
        if not isinstance(other, Plan):
            raise PlanError(f"diff: expected a plan, got a {type(other).__name__}")
        return diff_text((self.layers, other.layers), (self._total, other._total))

    @torch.inference_mode(False)  # or the result could not be trained
    def apply(
        self,
        model: nn.Module,
        *,
        moments: Mapping[str, Moments] | None = None,
        refit: Iterable[Any] | None = None,
        refine: Iterable[Any] | None = None,
        epochs: int = PASSES,
        mask: str | None = "attention_mask",
        example_inputs: Any = None,
        progress: ProgressOption = None,
        blocks: str | Sequence[str] | None = None,
    ) -> nn.Module:
        """A new model with the layers replaced; ``model`` is not changed.

        Args:
            model: the one that was analysed, or one with the same layers.
            moments: those of an analysis with data (``analysis.moments``), for a plan by a criterion that uses them
                and that was read from JSON.
            refit: a list of batches as for analyze(data=): layer after layer, factors and bias are fitted to the dense
                network's outputs on what reaches the layer in the compressed one, and the statistics of BatchNorms move
                along, see :mod:`alds_fast.factors.refitting`. One pass of both networks per layer, or of its block.
            refine: a list of batches, with or without ``refit``: in the end block after block is trained to return what
                the dense model's returns, see :func:`alds_fast.refine`. The model is a chain of blocks, and in float32.
            epochs: passes over ``refine`` for each block.
            mask: as for analyze.
            example_inputs: what the model is run with, as for flops=; by default the first batch of ``refit`` or of
                ``refine``. The result is run on them before it is given back.
            progress: as for analyze.
            blocks: with ``refit`` or ``refine``, names of the lists that hold the model's blocks, "model.layers" for
                one, where these are not found; ArgumentError if they are no chain.

        Errors hold before rounding to the weights' type: exactly, but for criterion "frobenius" under a budget other
        than error=, where large layers of low rank are factorised by a randomized SVD within 0.05 % of the stated
        error, and convolutions give a little of it up if the plan ``keeps_constants``. The result carries this plan,
        without moments and spectra, as ``alds_plan`` and, per replaced layer, how its factors were computed as
        ``alds_factors`` (name to :class:`alds_fast.factors.FactorReport`). Raises LayerNotFoundError, PlanError or
        WeightError where the plan does not fit the model, ModelError if the model cannot be copied, is no chain of
        blocks that ``refine`` needs, or the result is not what it must be. Warns of weights that have changed since
        they were analysed, and of optimizers, functions and adapters on the model that hold dense layers.
        """
        check_model(model)
        if count_params(model) != self.params_before:
            raise PlanError(f"the plan is for {self.params_before:,} parameters, the model has {count_params(model):,}")
        lists = check_lists(blocks)
        if lists and refit is None and refine is None:
            raise ArgumentError(f"blocks={blocks!r} goes with refit= or refine=: nothing else goes block by block")
        if refit is not None:
            check_batches(refit)
            refit = without_labels(model, refit)
        check_copyable(model)
        chosen = [row.choice for row in self.layers if row.choice is not None]
        names, basis = [choice.name for choice in chosen], self._basis(moments)
        fewer = {name for units in self.hidden_units for name in units.layers}
        model = opened_for(model, [*names, *fewer])
        if refine is not None:
            check_refining(model, names, refine, epochs, lists)
            refine = without_labels(model, refine)
        narrow = narrow_model(model, self.hidden_units, basis.weighting)
        if fewer:
            basis = basis.of_parts(NarrowMoments(basis.moments, self.hidden_units), fewer)
        warn_if_changed(narrow, self.spectra)
        inputs, called = inputs_of_run(model, example_inputs, refit, refine)
        with telling(progress) as tell:
            small, reports = factorize(
                narrow, chosen, self.spectra, exact=self.exact, constants=self.keeps_constants,
                weighted=basis.weighting, done=lambda count: tell("factors", count, len(chosen)),
            )  # fmt: skip
            before = None if inputs is None else check_way(narrow, small, names, inputs, called)
            with naming_readers(small):
                if refit is not None:
                    of = refit, mask, basis, tell, lists, rows_kept(self.hidden_units)
                    reports |= refit_steps(small, model, narrow, [*names, *fewer], *of)
                if refine is not None and (names or fewer):
                    reports |= refine_steps(small, model, narrow, refine, epochs, mask, reports, tell, lists)
        if before is not None:
            check_run(small, inputs, before)
        check_result(small, names, self.params)
        warn_of_holders(model, [*names, *fewer])
        warn_of_lost_merging(small, names)
        annotate(small, plan=replace(self, spectra={}, basis=None), factors=reports)  # models carry no data
        keep_when_saved(small)
        return small

    def _basis(self, moments: Mapping[str, Moments] | None) -> Basis:
        """What the factors are fitted to; PlanError where that needs moments and there are none."""
        basis = self.basis if self.basis is not None else Basis(self.criterion, {}, self.bias_correction)
        if moments is not None and not isinstance(moments, Mapping):
            raise PlanError(f"moments is a {type(moments).__name__}; pass analysis.moments, a mapping by layer name")
        basis = basis if moments is None else Basis(self.criterion, moments, self.bias_correction)
        by = {row.name: row.criterion or self.criterion for row in self.layers if row.choice}
        missing = [n for n, criterion in by.items() if CRITERIA[basis.criterion_of(n)] is not CRITERIA[criterion]]
        if missing:
            raise PlanError(
                f"layer {label(missing[0])}: criterion {self.criterion!r} needs moments, which plans in JSON do not "
                f"hold; pass plan.apply(model, moments=analysis.moments) of analyze(model, data=...)"
            )
        return basis

    def __repr__(self) -> str:
        return f"<Plan for {self._total}; print() has layers>"

    @property
    def _total(self) -> str:
        sizes = f"{self.params_before:,} -> {self.params:,} parameters"
        return f"{self.budget}: {sizes}, largest {self.criterion} error {self.error:.4g}"

    def __str__(self) -> str:
        held = "" if self.held_out is None else f", {self.held_out:.4g} on samples kept aside"
        total = (
            f"parameters {self.params_before:,} -> {self.params:,} ({self.keep_ratio:.2%} kept); largest "
            f"{self.criterion} error {self.error:.4g}{held}; asked {self.budget}; method {self.method}, p={self.p:g}, "
            f"gap {self.gap:.2g}"
        )
        costs = costs_lines(self.costs, self.budgets.get("memory"))
        return "\n".join([rows_text(self.layers), total, *costs, *(str(m) for m in (self.latency, self.quality) if m)])

    def to_json(self) -> str:
        """The plan as JSON text; exact round trip with :meth:`from_json`."""
        return plan_text(vars(self))

    @classmethod
    def from_json(cls, text: str) -> Plan:
        """Read a plan, checking every row; raises PlanError that names the row and the field.

        The scheme, groups and rank of a row may have been edited: its params_after is computed anew and its error, no
        longer known, becomes NaN, as does the plan's gap. Set scheme, groups and rank to null to keep a layer dense.
        """
        return cls(**read_plan(text))
