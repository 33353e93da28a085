"""What a layer multiplies its weight with: rows of its input (tokens, or im2col patches), and rows of its output."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...layers import CONVOLUTIONS, DecomposableLayer, LowRankLayer, Routed, is_linear, is_table, label
from ...measurement import Masks

Wanted = Callable[[int], int]


def all_rows(rows: int) -> int:
    """All of them."""
    return rows


def gives_tokens(module: nn.Module) -> bool:
    """Whether the last dimension of its output is all of a token."""
    return is_linear(module) or is_table(module)


def with_batch_dimension(module: nn.Module, x: Tensor) -> Tensor:
    """The input or output of a convolution with its batch dimension, which may have been left out."""
    if gives_tokens(module):
        return x
    assert isinstance(module, (*CONVOLUTIONS, LowRankLayer))
    axes = len(module.weight_shape.kernel if isinstance(module, LowRankLayer) else module.kernel_size)
    return x if x.dim() == axes + 2 else x.unsqueeze(0)


def fitting_mask(layer: DecomposableLayer, x: Tensor, masks: Masks, routed: Routed | None = None) -> Tensor | None:
    """That of a batch's masks (samples, tokens) that fits the leading dimensions of a Linear's input or output.

    Those are (samples, tokens), (tokens, samples) or both in one; of as many tokens as samples the first, unless the
    masks say otherwise. Of an expert's input the mask is that of the tokens ``routed`` to it. None, with a warning,
    where several that differ fit.
    """
    if not gives_tokens(layer.module):
        return None
    for alike in masks.of(layer.name):
        turned = ((keep.mT, keep) if masks.tokens_first else (keep, keep.mT) for keep in alike)
        fits = [_form(x, a, b) if routed is None else routed.of_all(a) for a, b in turned]
        found = [form for form in fits if form is not None]
        if any(not torch.equal(found[0], other) for other in found[1:]):
            warnings.warn(
                f"several masks of one batch fit layer {label(layer.name)}, so that all its tokens count, padding too; "
                f"say so by mask=None, or pass the inputs of one call a batch",
                stacklevel=2,
            )
            return None
        if found:
            return found[0]
    return None


def _form(x: Tensor, mask: Tensor, turned: Tensor) -> Tensor | None:
    """The form of a mask that fits the leading dimensions."""
    return next((form for form in (mask, mask.flatten(), turned) if x.shape[:-1] == form.shape), None)


def _by_row(leading: torch.Size, aside: Tensor, routed: Routed | None) -> Tensor:
    """Whether each row of the leading dimensions is of a sample that is kept aside.

    Samples are the first dimension, or go along it one after the other; else the second. Rows that are in no such order
    (those that a router gives to an expert, unless it says which) count by their place.
    """
    count = len(aside)
    if routed is not None and routed.total % count == 0:
        return aside[routed.rows * count // routed.total]
    if leading[0] % count == 0:
        flags = aside.repeat_interleave(leading[0] // count)
        return flags.view(-1, *[1] * (len(leading) - 1)).expand(leading)
    if len(leading) > 1 and leading[1] == count:
        return aside.view(1, -1, *[1] * (len(leading) - 2)).expand(leading)
    places = torch.arange(leading.numel(), device=aside.device) * count // leading.numel()
    return aside[places].view(leading)


def by_side(
    module: nn.Module, x: Tensor, keep: Tensor | None, aside: Tensor | None, routed: Routed | None = None
) -> tuple[tuple[Tensor, Tensor | None], tuple[Tensor, Tensor | None] | None]:
    """A layer's input or output with its mask, as :func:`patches` takes them: of the samples used, of those kept aside.

    ``aside`` (samples,) says which these are; without any the second part is None. ``routed``: the rows of an expert.
    """
    if aside is None or not bool(aside.any()):
        return (x, keep), None
    if not gives_tokens(module):
        batch = with_batch_dimension(module, x)
        flags = _by_row(batch.shape[:1], aside.to(x.device), None)
        return (batch[~flags], None), (batch[flags], None)
    rows = x if x.dim() > 1 else x.unsqueeze(0)
    flags = _by_row(rows.shape[:-1], aside.to(x.device), routed)
    return (rows, ~flags if keep is None else keep & ~flags), (rows, flags if keep is None else keep & flags)


def _windows(module: Any, x: Tensor) -> Tensor:
    """View (samples, *positions, channels, *kernel) of a convolution's padded input."""
    axes = len(module.kernel_size)
    if module.transposed:
        return _windows_under(module, x)
    pad = module._reversed_padding_repeated_twice
    if any(pad):
        x = F.pad(x, pad, "constant" if module.padding_mode == "zeros" else module.padding_mode)
    for axis in range(axes):
        reach = module.dilation[axis] * (module.kernel_size[axis] - 1) + 1
        x = x.unfold(2 + axis, reach, module.stride[axis])[..., :: module.dilation[axis]]
    return x.movedim(1, 1 + axes)


def _windows_under(module: Any, x: Tensor) -> Tensor:
    """The same of a transposed convolution: of its input with zeros between, over which its kernel goes backwards."""
    axes = len(module.kernel_size)
    sizes = [(n - 1) * stride + 1 for n, stride in zip(x.shape[2:], module.stride, strict=True)]
    spread = x.new_zeros([*x.shape[:2], *sizes])
    between: Any = (..., *(slice(None, None, stride) for stride in module.stride))
    spread[between] = x
    reach = [d * (k - 1) for d, k in zip(module.dilation, module.kernel_size, strict=True)]
    around = [(r - p, r - p + last) for r, p, last in zip(reach, module.padding, module.output_padding, strict=True)]
    x = F.pad(spread, [n for pair in reversed(around) for n in pair])
    for axis in range(axes):
        x = x.unfold(2 + axis, reach[axis] + 1, 1)[..., :: module.dilation[axis]]
    return x.movedim(1, 1 + axes)


def patches(
    module: nn.Module, x: Tensor, keep: Tensor | None = None, wanted: Wanted = all_rows, seed: int = 0
) -> tuple[Tensor, int]:
    """Rows (rows, conv_groups, columns of the encode fold) that the layer's weight is multiplied with.

    Args:
        module: a Linear or a convolution; of a transposed one a row has what lies under a position of the output, and
            zeros.
        x: its input.
        keep: for a Linear, a mask of the input's leading dimensions; rows where it is False are left out.
        wanted: how many of that many rows to return, drawn at random from ``seed``; at least one is.

    Returns:
        The rows, and how many there were to draw from.

    >>> patches(nn.Conv1d(1, 1, 2), torch.tensor([[[1.0, 2.0, 3.0]]]))[0][:, 0]
    tensor([[1., 2.],
            [2., 3.]])
    """
    if gives_tokens(module):
        rows = x[keep] if keep is not None else x.flatten(0, -2) if x.dim() > 1 else x.unsqueeze(0)
        return rows[_drawn(len(rows), wanted, seed, x.device)].unsqueeze(1), len(rows)
    module = module.dense_module() if isinstance(module, LowRankLayer) else module  # of the same settings
    windows: Any = _windows(module, with_batch_dimension(module, x))
    sizes = windows.shape[: windows.dim() - len(module.kernel_size) - 1]  # type: ignore[arg-type]
    drawn = _drawn(sizes.numel(), wanted, seed, x.device)
    at = drawn if isinstance(drawn, Tensor) else torch.arange(sizes.numel(), device=x.device)
    rows = windows[torch.unravel_index(at, tuple(sizes))]
    if module.transposed:
        rows = rows.flip([*range(2, rows.dim())])
    entries = math.prod(rows.shape[1:]) // module.groups
    return rows.reshape(len(rows), module.groups, entries), sizes.numel()


def outputs(
    module: nn.Module, y: Tensor, keep: Tensor | None = None, wanted: Wanted = all_rows, seed: int = 0
) -> tuple[Tensor, int]:
    """Rows (rows, conv_groups, filters of a group) of the layer's output or of a gradient at it, as :func:`patches`."""
    if gives_tokens(module):
        return patches(module, y, keep, wanted, seed)
    channels_last = with_batch_dimension(module, y).movedim(1, -1)
    drawn = _drawn(channels_last.shape[:-1].numel(), wanted, seed, y.device)
    rows = channels_last.flatten(0, -2)
    return rows[drawn].unflatten(1, (module.groups, -1)), len(rows)


def _drawn(rows: int, wanted: Wanted, seed: int, device: torch.device) -> Tensor | slice:
    """Which rows to take, in their order."""
    count = max(1, wanted(rows)) if rows else 0
    if count >= rows:
        return slice(None)
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(rows, (count,), generator=generator, device="cpu").sort().values.to(device)
