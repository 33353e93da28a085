"""What of a model's output matters, and its gradients."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import fields, is_dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import ArgumentError, ModelError
from .private_runs import copy_batch

Sensitivity = bool | str | Callable[[Any, Any], Tensor]
KL = "kl"
_PART = 1 << 22  # probabilities at once


def _all_floating(output: Any) -> Iterator[Tensor]:
    if isinstance(output, Tensor) and output.is_floating_point():
        yield output
    if is_dataclass(output) and not isinstance(output, Mapping):  # those of transformers are both
        output = [getattr(output, field.name) for field in fields(output)]
    values = output.values() if isinstance(output, Mapping) else output if isinstance(output, list | tuple) else ()
    for value in values:
        yield from _all_floating(value)


def first_floating(output: Any) -> Tensor | None:
    """The first floating-point tensor of a model's output that is no number, whatever containers it is in.

    A number, as the loss is that models return before their logits if the batch has labels, where there is no other.

    >>> first_floating({"loss": torch.tensor(0.5), "logits": torch.ones(1, 2)})
    tensor([[1., 1.]])
    """
    found = list(_all_floating(output))
    return next((tensor for tensor in found if tensor.dim()), found[0] if found else None)


def named_logits(output: Any) -> Tensor | None:
    """The tensor that a model's output calls logits, if any."""
    logits = output.get("logits") if isinstance(output, Mapping) else getattr(output, "logits", None)
    return logits if isinstance(logits, Tensor) else None


def _logits_of(output: Any, name: str) -> Tensor:
    """What the output calls logits, or else its first floating-point tensor; ModelError, for ``name``, without any."""
    named = named_logits(output)
    logits = first_floating(output) if named is None else named
    if logits is None or logits.dim() == 0:
        what = "a number, as a loss is" if logits is not None else "no floating-point tensor"
        raise ModelError(
            f"{name} needs an output of logits; of the {type(output).__name__} that the model returns the first value "
            f"is {what}; pass batches without labels, or a model whose output names its logits"
        )
    return logits


def _backward_from_roots(output: Any, generator: torch.Generator) -> float:
    """:func:`backward_from` square roots of the probabilities that logits stand for, over their last dimension.

    To second order a change of logits changes the Kullback-Leibler divergence by twice the squared distance of these.
    With r = sqrt(softmax(z)) and signs s, the gradient of s . r is (s * r - (s . r) r^2) / 2: a few rows at a time, as
    there may be many logits.
    """
    logits = _logits_of(output, f"sensitivity={KL!r}")
    _check_gradient(logits)
    gradient = torch.empty_like(logits.detach(), memory_format=torch.contiguous_format)
    rows, energy = logits.detach().reshape(-1, logits.shape[-1]), 0.0
    step = max(1, _PART // rows.shape[1])
    for z, g in zip(rows.split(step), gradient.view(rows.shape).split(step), strict=True):
        roots = z.float().softmax(-1).sqrt()
        signed = _signs(roots, generator).mul_(roots)
        g.copy_((signed - signed.sum(-1, keepdim=True) * roots.square()) / 2)
        energy += float(roots.square().sum(dtype=torch.float64))
    logits.backward(gradient)
    return energy


def _signs(like: Tensor, generator: torch.Generator) -> Tensor:
    bits = torch.randint(0, 2, like.shape, generator=generator, device="cpu", dtype=torch.int8)
    return bits.to(like.device, like.dtype).mul_(2).sub_(1)


def signs_of(number: int) -> torch.Generator:
    """What random signs of the batch of that number are drawn from, whichever batches have been before it."""
    return torch.Generator().manual_seed(number - 1)


def _check_gradient(z: Tensor | None) -> None:
    if isinstance(z, Tensor) and z.is_inference():
        raise ModelError(
            "the model's forward runs in torch.inference_mode(), which has no gradients: leave out sensitivity=, or "
            "take that out of the forward (torch.no_grad() around calls of the model does the same for users)"
        )
    if not isinstance(z, Tensor) or not z.requires_grad:
        raise ModelError(
            "sensitivity= needs a floating-point output that depends on the layers with gradients allowed; pass "
            "sensitivity=lambda output, batch: the tensor that matters"
        )


def check_sensitivity(sensitivity: object) -> None:
    """ArgumentError for what is none."""
    if not isinstance(sensitivity, bool) and sensitivity != KL and not callable(sensitivity):
        raise ArgumentError(
            f"sensitivity={sensitivity!r} is neither True or False nor {KL!r} nor a function of (output, batch)"
        )


def _asked(sensitivity: Callable[[Any, Any], Tensor], output: Any, batch: Any) -> Tensor:
    try:
        return sensitivity(output, copy_batch(batch))
    except Exception as e:
        raise ModelError(
            f"sensitivity= raised {type(e).__name__}: {e}; it is called with (output, batch), the model's output and "
            f"the batch that it came of"
        ) from e


def backward_from(output: Any, batch: Any, sensitivity: Any, generator: torch.Generator) -> float:
    """Gradients of what matters along random signs; returns the sum of its squares (1 for a loss)."""
    if sensitivity == KL:
        return _backward_from_roots(output, generator)
    z = _asked(sensitivity, output, batch) if callable(sensitivity) else first_floating(output)
    _check_gradient(z)
    assert isinstance(z, Tensor)
    if z.dim() == 0:
        z.backward()
        return 1.0
    z.backward(_signs(z, generator))
    return float(z.detach().square().sum(dtype=torch.float64))
