"""Where a layer with output pivots stores what: the inverse of its table of indices, made once for every table."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from ..errors import ArgumentError

_known = WeakTensorKeyDictionary()  # table -> (version, address, its inverse)


def check_order(order: Tensor, x: Tensor, outputs: int, groups: int) -> None:
    """order (outputs,) of int64 on the device of x, of one slice."""
    if groups != 1:
        raise ArgumentError(f"order= goes with one slice, groups={groups}")
    if order.dtype != torch.int64 or tuple(order.shape) != (outputs,):
        raise ArgumentError(
            f"order is {order.dtype} of shape {tuple(order.shape)}: expected torch.int64 of ({outputs},), for every "
            f"output its place among the pivots followed by the others"
        )
    if order.device != x.device:
        raise ArgumentError(f"order is on {order.device}, x on {x.device}; move one of them")


def outputs_number(decoder: Tensor, order: Tensor | None) -> int:
    """How many outputs a layer has: of one with pivots more than its decoder has rows."""
    return decoder.shape[0] if order is None else order.shape[0]


def _inverse(order: Tensor) -> Tensor:
    """Zero where ``order`` names no place, so that nothing is stored out of range whatever it holds."""
    places = torch.arange(len(order), dtype=torch.int32, device=order.device)
    return torch.zeros_like(places).scatter_(0, order, places)


def outputs_of(order: Tensor) -> Tensor:
    """Which output every pivot, and then every other row of the decoder, is: int32 (f,).

    Kept until the table changes or goes away; in the capture of a graph it is part of the graph.
    """
    if order.is_inference() or (order.is_cuda and torch.cuda.is_current_stream_capturing()):
        return _inverse(order)
    now = order._version, order.data_ptr()
    if order not in _known or _known[order][:2] != now:
        _known[order] = *now, _inverse(order)
        if order.is_cuda:  # calls on other streams may take it at once
            torch.cuda.synchronize(order.device)
    inverse: Tensor = _known[order][2]
    return inverse
