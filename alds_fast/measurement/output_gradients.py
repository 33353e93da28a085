"""What of a model's output matters, and its gradients."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from ..errors import ArgumentError, ModelError
from .private_runs import copy_batch

Sensitivity = bool | str | Callable[[Any, Any], Tensor]
KL = "kl"


def _first_floating(output: Any) -> Tensor | None:
    """The first floating-point tensor of a model's output, whatever containers it is in."""
    if isinstance(output, Tensor):
        return output if output.is_floating_point() else None
    values = output.values() if isinstance(output, Mapping) else output if isinstance(output, list | tuple) else ()
    return next((t for v in values if (t := _first_floating(v)) is not None), None)


def root_of_probabilities(output: Any, batch: Any) -> Tensor:
    """Square roots of the probabilities that the output's logits stand for, over its last dimension.

    To second order a change of logits changes the Kullback-Leibler divergence by twice the squared distance of these.
    """
    logits = _first_floating(output)
    if logits is None or logits.dim() == 0:
        raise ModelError(f"sensitivity={KL!r} needs an output of logits; the model returns a {type(output).__name__}")
    return logits.float().softmax(-1).sqrt()


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
    sensitivity = root_of_probabilities if sensitivity == KL else sensitivity
    z = _asked(sensitivity, output, batch) if callable(sensitivity) else _first_floating(output)
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
    if z.dim() == 0:
        z.backward()
        return 1.0
    bits = torch.randint(0, 2, z.shape, generator=generator, device="cpu", dtype=torch.int8)
    z.backward(bits.to(z.device, z.dtype).mul_(2).sub_(1))
    return float(z.detach().square().sum(dtype=torch.float64))
