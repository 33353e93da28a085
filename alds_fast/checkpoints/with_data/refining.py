"""Refinement of a checkpoint's blocks: what is trained of one block in memory, what was trained in the journal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from ...blocks import BlockChain
from ...errors import FileFormatError, ModelError
from ...factors import FactorReport, Refined, Steps, refine_blocks, trained_reports
from ...files import crc32
from ...layers import LowRankLayer, is_narrowed
from ...planning import Plan
from ..safetensors_reader import DTYPES
from ..streaming.journal import WIDE
from ..streaming.output_files import Replacement
from ..streaming.streamed_model import Work
from .calibration import room
from .factors import FIELDS, best_kind, load_small
from .mapped import as_computed, let_go, load_mapped, runs
from .narrowing import load_narrow

REFINED = "refined"
_REPORTS, _SUMS = "reports", "crc32"
Results = dict[str, tuple[dict[str, Any], dict[str, Tensor]]]  # by layer: how, and its factors


class _Steps(Steps):
    """Copies a block's parameters before they are trained, and writes them to the journal afterwards."""

    def __init__(
        self, work: Work, small: nn.Module, narrow: nn.Module, blocks: Sequence[str], numbers: Mapping[str, int]
    ) -> None:
        self.work, self.small, self.narrow, self.blocks, self.numbers = work, small, narrow, list(blocks), numbers
        self.known = {block for i, block in enumerate(blocks) if work.journal.has(REFINED, i)}
        self._names = {id(p): name for name, p in small.named_parameters()}
        self._trained: Sequence[nn.Parameter] = ()
        for block in self.known:
            self._check(self.blocks.index(block))
            self._take(self.blocks.index(block))

    def begin(self, parameters: Sequence[nn.Parameter]) -> None:
        """Gives them memory of their own."""
        self._trained = parameters
        for parameter in parameters:  # what is mapped is let go, changes and all
            parameter.data = parameter.data.clone()

    def end(self, block: Refined) -> None:
        """Writes what was trained, and how good it is, and maps it from there."""
        position, journal = self.blocks.index(block.block), self.work.journal
        inside = [name for name in self.numbers if name.startswith(f"{block.block}.")]
        before = {name: FactorReport(**journal.notes(best_kind(self.work, self.numbers[name]), self.numbers[name]))
                  for name in inside}  # fmt: skip
        better = [block.block] if block.after < block.before else []
        reports = before | trained_reports(before, self.small, self.narrow, REFINED, better)
        fields = {name: {field: getattr(report, field) for field in FIELDS} for name, report in reports.items()}
        trained = {self._names[id(p)]: p.detach().cpu() for p in self._trained}
        sums = {name: crc32(tensor) for name, tensor in trained.items()}
        journal.put(REFINED, position, trained, {_REPORTS: fields, _SUMS: sums})
        self._take(position)
        let_go([self.work.shards.folder, journal.folder])

    def _check(self, position: int) -> None:
        """FileFormatError where a block is not what was written: those behind it are trained on its outputs."""
        tensors, notes = self.work.journal.get(REFINED, position)
        if {name: crc32(tensor) for name, tensor in tensors.items()} != notes.get(_SUMS):
            damaged = str(self.work.journal.path(REFINED, position))
            raise FileFormatError(f"{damaged!r} is damaged; remove it and run the same command again")

    def _take(self, position: int) -> None:
        """Mapped out of the journal."""
        names = self.work.journal.names(REFINED, position)
        for name, tensor in self.work.journal.some(REFINED, position, {name: name for name in names}).items():
            self.small.get_parameter(name).data = tensor


def refine_factors(
    work: Work, model: nn.Module, chain: BlockChain, batches: Sequence[Any], plan: Plan,
    choices: Mapping[int, Replacement], passes: int,
) -> tuple[Results, dict[str, Tensor]]:  # fmt: skip
    """Blocks trained to return what the dense model's return, see :func:`alds_fast.refine`.

    Results by layer, and all else that was trained, by the names that it is stored under.
    """
    if not chain.blocks:
        raise ModelError(f"refine= needs a chain of blocks: {chain.reason}; leave it out")
    wide = any(p.dtype.itemsize < 4 for p in model.parameters())
    dense = as_computed(work, load_mapped(work.shards), WIDE, wide) if wide else model
    small = load_small(work, plan, choices, wide)
    narrow = load_narrow(work, plan) if plan.hidden_units else dense
    steps = _Steps(work, small, narrow, chain.blocks, {choice.name: number for number, choice in choices.items()})
    with runs(work, dense, small, blocks=chain.blocks):
        refine_blocks(
            small, dense, batches, epochs=passes, chain=chain, steps=steps, room=lambda: room(work),
            progress=work.progress,
        )  # fmt: skip
    return _results(work, small, len(chain.blocks))


def _results(work: Work, small: nn.Module, blocks: int) -> tuple[Results, dict[str, Tensor]]:
    """Factors, or weights of narrower layers, by layer; all else that was trained."""
    results: Results = {}
    others: dict[str, Tensor] = {}
    for position in (i for i in range(blocks) if work.journal.has(REFINED, i)):
        tensors, notes = work.journal.get(REFINED, position)
        for name, tensor in tensors.items():
            layer, _, field = name.rpartition(".")
            module = small.get_submodule(layer)
            if (field in ("encoder", "decoder") and isinstance(module, LowRankLayer)) or (
                field == "weight" and is_narrowed(module)
            ):
                results.setdefault(layer, (notes[_REPORTS][layer], {}))[1][field] = tensor
            else:
                source = work.names[name]
                others[source] = tensor.to(DTYPES[work.shards.tensors[source].dtype])
    return results, others
