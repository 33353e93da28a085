"""Factors by the layers' moments, then fitted to what reaches the layers: in the journal one by one."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from ...blocks import BlockChain
from ...criteria import CRITERIA, Basis
from ...factors import Choice, FactorReport, Gradient, plain_layers, refit, weighted_layer
from ...files import crc32
from ...layers import DecomposableLayer, LowRankLayer, low_rank_like
from ...measurement import USUAL
from ...planning import Plan
from ..safetensors_reader import DTYPES
from ..streaming.streamed_model import Work
from .calibration import room
from .mapped import let_go, load_mapped, one_block_at_a_time, run_on

DRAFT, REFITTED = "draft", "refitted"
FIELDS = ("method", "iterations", "error", "data_error")


def _put(work: Work, kind: str, number: int, low: LowRankLayer, report: FactorReport) -> None:
    tensors = {name: getattr(low, name).detach().cpu() for name in ("encoder", "decoder")}
    tensors |= {"order": low.order.cpu()} if low.pivots else {}
    work.journal.put(kind, number, tensors, {field: getattr(report, field) for field in FIELDS})


def best_kind(work: Work, number: int) -> str:
    """What the journal has of a layer's factors."""
    return REFITTED if work.journal.has(REFITTED, number) else DRAFT


def put_final(work: Work, number: int, choice: Choice, refined: Mapping[str, Any]) -> None:
    """What is written to the output's files: a layer's factors in its stored type, and how they were computed.

    ``refined``: by layer, what came of refinement, factors among the fields.
    """
    tensors, notes = work.journal.get(best_kind(work, number), number)
    if choice.name in refined:
        notes, new = refined[choice.name]
        tensors |= new
    dtype = DTYPES[work.shards.tensors[work.sources[choice.name]].dtype]
    tensors |= {name: tensors[name].to(dtype) for name in ("encoder", "decoder")}
    fields = {field: notes[field] for field in ("method", "iterations", "error")}
    work.journal.put("report", number, {}, fields | {f"crc32.{name}": crc32(t) for name, t in tensors.items()})
    work.journal.put("factors", number, tensors, {})


def draft_factors(
    work: Work, plan: Plan, basis: Basis, layers: Mapping[str, DecomposableLayer], choices: Mapping[int, Choice]
) -> None:
    """Factors by the layers' moments, or by the weights alone where these serve, of layers that have none yet."""
    todo = [number for number in choices if not work.journal.has(DRAFT, number)]
    own = work.share(todo)
    for count, number in enumerate(own, 1):
        choice = choices[number]
        layer, weighting = layers[choice.name], basis.weighting(layers[choice.name])
        if weighting is None:
            _, low, report = next(plain_layers([(choice, layer)], {}, plan.exact))
        else:
            low, report, _ = weighted_layer(layer, choice, weighting)
        _put(work, DRAFT, number, low, report)
        let_go([work.shards.folder])
        work.progress("factors", count, len(own))
    work.world.together()


class _Gradients(Mapping[str, Gradient]):
    """The second moments of gradients, and their noise, of layers judged by them; read when they are asked for."""

    def __init__(self, basis: Basis, names: Sequence[str]) -> None:
        self.basis = basis
        self.names = [n for n in names if CRITERIA[basis.criterion_of(n)].needs_gradients]

    def __getitem__(self, name: str) -> Gradient:
        if name not in self.names:
            raise KeyError(name)
        moments = self.basis.moments[name]
        return moments.gradient, moments.gradient_noise

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)


def refit_factors(
    work: Work, model: nn.Module, chain: BlockChain, batches: Sequence[Any], basis: Basis,
    layers: Mapping[str, DecomposableLayer], choices: Mapping[int, Choice],
) -> None:  # fmt: skip
    """Factors fitted to what reaches the layers in the compressed network, see :func:`alds_fast.factors.refit`."""
    numbers = {choice.name: number for number, choice in choices.items()}
    known = {choice.name for number, choice in choices.items() if work.journal.has(REFITTED, number)}
    work.world.together()
    if len(known) == len(choices):
        return
    small = load_small(work, choices)
    count = len(known)

    def done(name: str, report: FactorReport | None) -> None:
        nonlocal count
        count += 1
        low, number = small.get_submodule(name), numbers[name]
        assert isinstance(low, LowRankLayer)
        if report is None:
            report = FactorReport(**work.journal.notes(DRAFT, number))
        if work.world.first:
            _put(work, REFITTED, number, low, report)
        work.world.together()
        _take(work, REFITTED, number, low)
        let_go([work.shards.folder, work.journal.folder])
        work.progress("refit", count, len(choices))

    folder, blocks = work.shards.folder, chain.blocks or None
    with (
        one_block_at_a_time(model, folder, work.settings.blocks), run_on(work.device, model, folder, blocks),
        run_on(work.device, small, folder, blocks),
    ):  # fmt: skip
        refit(
            small, model, [layers[name] for name in numbers], batches, gradients=_Gradients(basis, list(numbers)),
            bias_correction=False, mask=USUAL, chain=chain, known=known, done=done, room=lambda: room(work),
            world=work.world,
        )  # fmt: skip


def load_small(work: Work, choices: Mapping[int, Choice], wide: bool = False) -> nn.Module:
    """The compressed model as far as it is, its weights mapped; ``wide`` as :func:`load_mapped`."""
    small = load_mapped(work.shards, work.device, wide)
    for number, choice in choices.items():
        dense = small.get_submodule(choice.name)
        low = low_rank_like(dense, choice.decomposition).to(dense.weight.dtype)  # type: ignore[arg-type]
        low = low.to_empty(device="cpu").requires_grad_(False)
        low.bias = dense.bias if isinstance(dense.bias, Tensor) else None
        _take(work, best_kind(work, number), number, low)
        small.set_submodule(choice.name, low.eval())
    return small


def _take(work: Work, kind: str, number: int, low: LowRankLayer) -> None:
    """Give a layer the factors that are in the journal, mapped, in the parameters that it has."""
    names = ("encoder", "decoder", *(["order"] if low.pivots else []))
    for name, tensor in work.journal.some(kind, number, {name: name for name in names}).items():
        getattr(low, name).data = tensor.to(getattr(low, name).dtype)
