"""Factors as int8 with a scale for every row: a quarter of float32's bytes, half of float16's, and what it costs."""

from __future__ import annotations

import copy
import logging
from dataclasses import dataclass
from typing import Literal, overload

import torch
from torch import Tensor, nn

from ..checks import check_model
from ..errors import ArgumentError, ModelError, WeightError
from ..layers import (
    Int8LowRankLinear,
    LowRankLayer,
    LowRankLinear,
    MergedLinears,
    bad_values,
    has_plain_memory,
    label,
    replace_layers,
    tied_names,
)
from ..text import ShownInNotebooks, shape_text, size_text, table
from .autotune import is_plain

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class QuantizedRow:
    """One layer whose factors were quantised.

    Attributes:
        name, shape, structure: the layer, its dense weight's shape, its scheme, groups and rank.
        bytes_before, bytes_after: of both factors, afterwards with their scales.
        encoder_error, decoder_error: of each factor, as it is stored, the relative Frobenius error.
        weight_error: that of the weight that both stand for.
    """

    name: str
    shape: tuple[int, ...]
    structure: str
    bytes_before: int
    bytes_after: int
    encoder_error: float
    decoder_error: float
    weight_error: float


@dataclass(frozen=True)
class QuantizeTable(ShownInNotebooks):
    """What quantisation did to every low-rank layer.

    Attributes:
        rows: one :class:`QuantizedRow` per layer with int8 factors.
        left_out: low-rank layers that are as they were, by name, with the reason.
    """

    rows: tuple[QuantizedRow, ...]
    left_out: dict[str, str]

    @property
    def summary(self) -> str:
        """Layers, bytes and the largest error, in one line."""
        before, after = (sum(getattr(row, name) for row in self.rows) for name in ("bytes_before", "bytes_after"))
        worst = max(self.rows, key=lambda row: row.weight_error)
        left = f"; {len(self.left_out)} layers are left as they are" if self.left_out else ""
        return (
            f"int8 factors in {len(self.rows)} layers: {size_text(before)} became {size_text(after)}, relative errors "
            f"of weights up to {worst.weight_error:.2%} (layer {label(worst.name)}){left}"
        )

    def __repr__(self) -> str:
        return f"<QuantizeTable of {len(self.rows)} layers; print() has them>"

    def __str__(self) -> str:
        headers = ["layer", "shape", "structure", "bytes before", "after", "encoder error", "decoder", "weight"]
        rows = [
            [
                *(row.name or "(model)", shape_text(row.shape), row.structure),
                *(f"{row.bytes_before:,}", f"{row.bytes_after:,}"),
                *(f"{error:.2%}" for error in (row.encoder_error, row.decoder_error, row.weight_error)),
            ]
            for row in self.rows
        ]
        left = [f"layer {label(name)} is left as it is: {reason}" for name, reason in self.left_out.items()]
        return "\n".join([table(headers, rows, left=(0, 2)), *left, self.summary])


def _why_not(layer: LowRankLayer, tied: dict[int, list[str]]) -> str | None:
    """Why a layer's factors are left as they are; None where they become int8."""
    if not isinstance(layer, LowRankLinear):
        return f"int8 factors are for LowRankLinear, it is a {type(layer).__name__}"
    if not is_plain(layer, tied):
        return "it is a subclass, or has hooks, a forward of its own or factors that other modules hold too"
    other = next((f for f in (layer.encoder, layer.decoder) if not f.is_meta and not has_plain_memory(f)), None)
    return None if other is None else f"its factors are {type(other).__name__}s, not plain tensors"


def _check_factors(name: str, layer: LowRankLinear) -> None:
    for kind in ("encoder", "decoder"):
        factor = getattr(layer, kind)
        if factor.is_meta:
            raise WeightError(f"layer {label(name)}: its {kind} is on the meta device; load the weights first")
        if bad := bad_values(factor, infinite=True):
            raise WeightError(
                f"layer {label(name)}: {bad} of {factor.numel()} values of its {kind} are NaN or infinite; mend them"
            )


def _relative(new: Tensor, old: Tensor) -> float:
    """Frobenius, 0 where there is none."""
    error = new - old
    return float(error.norm() / old.norm()) if bool(error.any()) else 0.0


def _norm(left: Tensor, right: Tensor) -> float:
    """Of the products left @ right, (..., n, k) and (..., k, m), by their k x k Gram matrices."""
    square = ((left.mT @ left) * (right @ right.mT)).sum()
    return float(square.clamp_min(0).sqrt())


def _weight_error(old: LowRankLinear, new: LowRankLinear) -> float:
    """Relative Frobenius error of the weight; D E - D' E' = D (E - E') + (D - D') E', so that nothing cancels."""
    (left, right), (new_left, new_right) = old.slice_factors(), new.slice_factors()
    norm = _norm(left, right)
    error = _norm(torch.cat([left, left - new_left], -1), torch.cat([right - new_right, new_right], -2))
    return error / norm if norm > 0 else 0.0


def _row(name: str, layer: LowRankLinear, int8: Int8LowRankLinear) -> QuantizedRow:
    stored = (int8.encoder_int8, int8.encoder_scale, int8.decoder_int8, int8.decoder_scale)
    before, after = (sum(t.nbytes for t in those) for those in ((layer.encoder, layer.decoder), stored))
    wide = torch.promote_types(layer.encoder.dtype, torch.float32)
    old, new = (copy.deepcopy(one).to(wide) for one in (layer, int8))
    encoder, decoder = _relative(new.encoder, old.encoder), _relative(new.decoder, old.decoder)
    shape, structure = layer.weight_shape.weight, str(layer.decomposition)
    return QuantizedRow(name, shape, structure, before, after, encoder, decoder, _weight_error(old, new))


def _chosen(model: nn.Module) -> tuple[dict[str, LowRankLinear], dict[str, str]]:
    """The layers that are to be quantised, and by name why others are not; ModelError where it is all for nothing."""
    chosen: dict[str, LowRankLinear] = {}
    left_out: dict[str, str] = {}
    tied = tied_names(model)
    for name, module in model.named_modules():
        if isinstance(module, MergedLinears):
            raise ModelError(f"{label(name)}: layers are merged by deploy; pass the model that was given to deploy")
        if isinstance(module, Int8LowRankLinear):
            raise ModelError(f"layer {label(name)} has int8 factors already; pass the model as it was before")
        if isinstance(module, LowRankLayer) and (reason := _why_not(module, tied)) is not None:
            left_out[name] = reason
        elif isinstance(module, LowRankLinear):
            chosen[name] = module
    if not chosen:
        why = [f"{label(name)}: {reason}" for name, reason in left_out.items()]
        remedy = "; ".join(why[:3]) or "pass one made by compress(), Plan.apply() or load()"
        raise ModelError(f"the model has no low-rank linear layer that can have int8 factors: {remedy}")
    return chosen, left_out


@overload
def quantize_factors(model: nn.Module, kind: str = ..., *, report: Literal[False] = ...) -> nn.Module: ...


@overload
def quantize_factors(
    model: nn.Module, kind: str = ..., *, report: Literal[True]
) -> tuple[nn.Module, QuantizeTable]: ...


@torch.no_grad()
def quantize_factors(
    model: nn.Module, kind: str = "int8", *, report: bool = False
) -> nn.Module | tuple[nn.Module, QuantizeTable]:
    """A copy of a compressed model whose low-rank linear layers store their factors as int8.

    Every row of an encoder and of a decoder has a scale, its largest magnitude / 127, in the type of the layer. Biases,
    inputs and outputs keep their types. Up to 16 rows of input the fused kernel reads the integers on a GPU; more rows,
    and CPUs, take the dequantised factors, made anew at every call. Other low-rank layers (convolutions, embeddings)
    are left as they are. The result can be saved, loaded and deployed; it cannot be compressed or trained further.

    Args:
        model: a model with low-rank linear layers; it is not changed.
        kind: "int8".
        report: also return the :class:`QuantizeTable`: bytes, and errors as measured, layer by layer.

    Returns:
        The copy, or (copy, table). The logger "alds_fast" says bytes and the largest error in one line.

    Raises:
        ModelError: there is nothing to quantise, layers have int8 factors already or were merged by deploy.
        WeightError: a factor has NaN or infinity, or no values. ArgumentError: kind or report is none of its values.

    >>> import torch, alds_fast as alds
    >>> small = alds.compress(torch.nn.Sequential(torch.nn.Linear(256, 256)), params=0.25, groups=(1,))
    >>> tiny, table = quantize_factors(small, report=True)
    >>> tiny[0]
    Int8LowRankLinear(in_features=256, out_features=256, scheme=0, groups=1, rank=33, pivots='output', int8)
    >>> table.rows[0].bytes_before // table.rows[0].bytes_after, table.rows[0].weight_error < 0.05
    (3, True)
    """
    check_model(model)
    if kind != "int8":
        raise ArgumentError(f"kind={kind!r} is not 'int8', the only kind of factors beside floating-point ones")
    if not isinstance(report, bool):
        raise ArgumentError(f"report={report!r} is not True or False")
    chosen, left_out = _chosen(model)
    new: dict[str, nn.Module] = {}
    rows: list[QuantizedRow] = []
    for name, layer in chosen.items():
        _check_factors(name, layer)
        new[name] = int8 = Int8LowRankLinear.of(layer)
        rows.append(_row(name, layer, int8))
    found = QuantizeTable(tuple(rows), left_out)
    _LOG.info("quantize_factors: %s", found.summary)
    result = replace_layers(model, new)
    return (result, found) if report else result
