"""Factors by the layers' moments, then fitted to what reaches the layers: in the journal one by one."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from ...blocks import BlockChain
from ...criteria import CRITERIA, Basis
from ...factors import Choice, FactorReport, Gradient, plain_layers, refit, rows_kept, weighted_layer
from ...files import crc32
from ...layers import DecomposableLayer, LowRankLayer, low_rank_like
from ...measurement import USUAL
from ...planning import Plan
from ..safetensors_reader import DTYPES
from ..streaming.journal import WIDE
from ..streaming.output_files import Replacement
from ..streaming.streamed_model import Work
from .calibration import room
from .mapped import as_computed, let_go, let_weights_go, runs
from .narrowing import NARROW, load_narrow

DRAFT, REFITTED = "draft", "refitted"
_DENSE = ("weight",)
FIELDS = ("method", "iterations", "error", "data_error")


def _names(layer: nn.Module) -> tuple[str, ...]:
    """Of what the journal has of a layer: its factors, or the weight of one that stays dense."""
    if not isinstance(layer, LowRankLayer):
        return _DENSE
    return ("encoder", "decoder", "order") if layer.pivots else ("encoder", "decoder")


def _put(work: Work, kind: str, number: int, low: nn.Module, report: FactorReport) -> None:
    tensors = {name: getattr(low, name).detach().cpu() for name in _names(low)}
    work.journal.put(kind, number, tensors, {field: getattr(report, field) for field in FIELDS})


def best_kind(work: Work, number: int) -> str:
    """What the journal has of a layer's factors, or of its weight."""
    return next((kind for kind in (REFITTED, DRAFT) if work.journal.has(kind, number)), NARROW)


def put_final(work: Work, number: int, choice: Replacement, refined: Mapping[str, Any]) -> None:
    """What is written to the output's files: a layer's factors in its stored type, and how they were computed.

    ``refined``: by layer, what came of refinement, factors among the fields.
    """
    names = ("encoder", "decoder") if isinstance(choice, Choice) else _DENSE
    tensors, notes = work.journal.get(best_kind(work, number), number)
    if choice.name in refined:
        notes, new = refined[choice.name]
        tensors |= new
    dtype = DTYPES[work.shards.tensors[work.sources[choice.name]].dtype]
    tensors = {n: t.to(dtype) if n in names else t for n, t in tensors.items() if n in (*names, "order")}
    fields = {field: notes[field] for field in ("method", "iterations", "error")}
    work.journal.put("report", number, {}, fields | {f"crc32.{name}": crc32(t) for name, t in tensors.items()})
    work.journal.put("factors", number, tensors, {})


def draft_factors(
    work: Work, plan: Plan, basis: Basis, layers: Mapping[str, DecomposableLayer], choices: Mapping[int, Replacement]
) -> None:
    """Factors by the layers' moments, or by the weights alone where these serve, of layers that have none yet."""
    wanted = {number: choice for number, choice in choices.items() if isinstance(choice, Choice)}
    own = work.share([number for number in wanted if not work.journal.has(DRAFT, number)])
    for count, number in enumerate(own, 1):
        _put(work, DRAFT, number, *_draft(work, plan, basis, layers[wanted[number].name], wanted[number]))
        let_weights_go(work)
        work.progress("factors", count, len(own))
    work.world.together()


def _draft(
    work: Work, plan: Plan, basis: Basis, layer: DecomposableLayer, choice: Choice
) -> tuple[LowRankLayer, FactorReport]:
    weighting = basis.weighting(layer)
    let_go([work.shards.folder, work.journal.folder])  # the moments
    if weighting is None:
        return next(plain_layers([(choice, layer)], {}, plan.exact))[1:]
    return weighted_layer(layer, choice, weighting)[:2]


class _Gradients(Mapping[str, Gradient]):
    """The second moments of gradients, and their noise, of layers judged by them; read when they are asked for.

    That is before a layer is fitted: what was run for its sums is let go.
    """

    def __init__(self, work: Work, basis: Basis, names: Sequence[str]) -> None:
        self.work, self.basis = work, basis
        self.names = [n for n in names if CRITERIA[basis.criterion_of(n)].needs_gradients]

    def __getitem__(self, name: str) -> Gradient:
        let_go([self.work.shards.folder, self.work.journal.folder])
        if name not in self.names:
            raise KeyError(name)
        moments = self.basis.moments[name]
        return moments.gradient, moments.gradient_noise

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)


def refit_factors(
    work: Work, model: nn.Module, chain: BlockChain, batches: Sequence[Any], plan: Plan, basis: Basis,
    layers: Mapping[str, DecomposableLayer], choices: Mapping[int, Replacement],
) -> None:  # fmt: skip
    """Factors fitted to what reaches the layers in the compressed network, see :func:`alds_fast.factors.refit`."""
    numbers = {choice.name: number for number, choice in choices.items()}
    known = {choice.name for number, choice in choices.items() if work.journal.has(REFITTED, number)}
    work.world.together()
    if len(known) == len(choices):
        return
    small = load_small(work, plan, choices)
    count = len(known)

    def done(name: str, report: FactorReport | None) -> None:
        nonlocal count
        count += 1
        low, number = small.get_submodule(name), numbers[name]
        if report is None:
            report = FactorReport(**work.journal.notes(best_kind(work, number), number))
        if work.world.first:
            _put(work, REFITTED, number, low, report)
        work.world.together()
        _take(work, REFITTED, number, low)
        let_go([work.shards.folder, work.journal.folder])
        work.progress("refit", count, len(choices))

    with runs(work, model, small, blocks=chain.blocks or None):
        refit(
            small, model, [layers[name] for name in numbers], batches, gradients=_Gradients(work, basis, list(numbers)),
            bias_correction=False, mask=USUAL, chain=chain, known=known, done=done, room=lambda: room(work),
            world=work.world, rows=rows_kept(plan.hidden_units),
        )  # fmt: skip


def load_small(work: Work, plan: Plan, choices: Mapping[int, Replacement], wide: bool = False) -> nn.Module:
    """The compressed model as far as it is, its weights mapped; ``wide`` as :func:`as_computed`."""
    small = load_narrow(work, plan)
    for number, choice in choices.items():
        dense: Any = small.get_submodule(choice.name)
        if not isinstance(choice, Choice):
            _take(work, best_kind(work, number), number, dense)
            continue
        low = low_rank_like(dense, choice.decomposition).to(dense.weight.dtype)
        low = low.to_empty(device="cpu").requires_grad_(False)
        low.bias = dense.bias if isinstance(dense.bias, Tensor) else None
        _take(work, best_kind(work, number), number, low)
        small.set_submodule(choice.name, low.eval())
    return as_computed(work, small, f"{WIDE}-small", wide)


def _take(work: Work, kind: str, number: int, low: nn.Module) -> None:
    """Give a layer the factors that are in the journal, mapped, in the parameters that it has."""
    for name, tensor in work.journal.some(kind, number, {name: name for name in _names(low)}).items():
        getattr(low, name).data = tensor
