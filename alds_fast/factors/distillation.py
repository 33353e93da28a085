"""A compressed model trained as a whole to return what the dense model returns, without labels.

Logits are compared by the Kullback-Leibler divergence of the probabilities that they stand for (Hinton, Vinyals, Dean,
"Distilling the Knowledge in a Neural Network", 2015, here at temperature 1), other outputs by their squared distance.
The dense model is run batch by batch: its outputs are not kept.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable
from contextlib import ExitStack
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import ArgumentError, ModelError
from ..layers import annotate
from ..measurement import (
    USUAL,
    Masks,
    Run,
    first_floating,
    masks_of,
    named_logits,
    naming_batch,
    private_runs,
    without_labels,
)
from ..progress import ProgressOption, telling
from .training import (
    asking,
    check_pair,
    check_schedule,
    kept_places,
    set_aside,
    train,
    trained_parameters,
    trained_reports,
)

_NAME = "distill()"


class Distilled(NamedTuple):
    """How far a model's output is from the dense model's on the batches kept aside, before and after.

    In nats per token or sample where outputs are compared as logits, ``kl``; else as a relative error.
    """

    before: float
    after: float
    kl: bool


def names_logits(output: Any) -> bool:
    """Whether a model's output says which tensor of it are logits."""
    return named_logits(output) is not None


def _compared(output: Any, name: str) -> Tensor:
    """The output's logits where it names some, or else its first floating-point tensor."""
    named = named_logits(output)
    tensor = first_floating(output) if named is None else named
    if tensor is None or tensor.dim() == 0:
        raise ModelError(f"{name} needs an output of floating-point tensors; the model returns {type(output)}")
    return tensor


def output_distance(output: Any, wanted: Any, masks: Masks, kl: bool, number: int, name: str) -> tuple[Tensor, float]:
    """How far a model's output on a batch is from the dense model's, and what that is divided by.

    The sum of the tokens' Kullback-Leibler divergences, in nats, and how many tokens there are; or without ``kl`` the
    squared distance and the dense output's squared norm. What ``masks`` leave out does not count in outputs of more
    than two dimensions; those of two are of whole samples. ``name`` is what errors call the caller.
    """
    output, target = _compared(output, name), _compared(wanted, name)
    if target.shape != output.shape:
        raise ModelError(f"the models return {tuple(output.shape)} and {tuple(target.shape)} on batch {number}")
    keep = ... if output.dim() < 3 else kept_places(masks, "decoder", output, "the model")
    output, target = output[keep].float(), target[keep].float()
    if not bool(target.isfinite().all()):
        raise ModelError(f"the dense model returns NaN or infinite values on batch {number}")
    if torch.is_grad_enabled() and not output.requires_grad:
        raise ModelError(
            "the compressed model's output has no gradient: its forward runs under torch.no_grad() or detaches it"
        )
    if not kl:
        return (output - target).square().sum(), float(target.square().sum())
    output, target = output.log_softmax(-1), target.log_softmax(-1)
    return F.kl_div(output, target, reduction="sum", log_target=True), float(target[..., 0].numel())


class _Pair:
    """A compressed model and the dense one, whose outputs are compared."""

    def __init__(self, small: nn.Module, run_small: Run, run_dense: Run, kl: bool | None, mask: str | None) -> None:
        self.small, self.run_small, self.run_dense, self.kl, self.mask = small, run_small, run_dense, kl, mask

    def losses(self, number: int, batch: Any) -> list[tuple[Tensor, float]]:
        """:func:`output_distance` on a batch."""
        with naming_batch(number, _NAME):
            with torch.no_grad():
                wanted = self.run_dense(batch, number, f"batch {number} of {_NAME}")
            output = self.run_small(batch, number, f"batch {number} of {_NAME}")
        if self.kl is None:
            self.kl = names_logits(wanted)
        masks = masks_of(self.small, batch, self.mask)
        return [output_distance(output, wanted, masks, self.kl, number, _NAME)]


@torch.inference_mode(False)  # or nothing could be trained
def distill(
    small: nn.Module,
    model: nn.Module,
    data: Iterable[Any],
    *,
    epochs: int = 3,
    lr: float = 1e-4,
    kl: bool | None = None,
    mask: str | None = USUAL,
    progress: ProgressOption = None,
) -> tuple[nn.Module, Distilled]:
    """A copy of a compressed model, all of whose layers were trained for the dense model's output, without labels.

    Args:
        small: the compressed model, of any plan or method, refined or not, in float32 or float64; it is not changed.
        model: the dense one that it was made of.
        data: a list of batches as for :func:`alds_fast.analyze`, without labels, two at least; an eighth is kept aside,
            one at least. Each batch is one step, so that they should be small.
        epochs: passes over the others.
        lr: learning rate of AdamW at the beginning, as a share of each parameter's root mean square; it goes to 0 along
            a cosine. All layers together bear less than single blocks do: five times the default gained nothing on
            SmolLM2.
        kl: True compares the outputs as logits, sum_i p_i (log p_i - log q_i) over their last dimension, p the dense
            model's probabilities and q the compressed one's; False by their squared distance; None as logits where the
            output has ``logits``, as those of language models and classifiers of transformers have.
        mask: as for analyze: what is padding does not count.
        progress: as for :func:`alds_fast.analyze`, after each pass.

    Returns:
        The model as it was after the pass that did best on the batches kept aside, or as it was before where none did
        better, and the distances on them.

    What is trained are the low-rank layers, all biases, and scales of norms. Both models are run for every step, and
    the activations of the compressed one are kept for one batch. For a chain of blocks :func:`alds_fast.refine` takes
    less memory and is a good beginning. For labels and training loops of your own see :func:`alds_fast.retrain`.

    Raises:
        ArgumentError: an argument is out of range; half types.
        ModelError: the second model is not the dense one, or a model has raised an exception.
    """
    check_pair(small, model, "distill")
    check_schedule(data, "data", epochs, lr)
    data = without_labels(model, data)
    if kl is not None and not isinstance(kl, bool):
        raise ArgumentError(f"kl={kl!r} is not True, False or None")
    used, aside = set_aside(data, "data")
    small = copy.deepcopy(small)
    parameters = trained_parameters(small)
    with ExitStack() as stack:
        tell = stack.enter_context(telling(progress))
        run_dense = stack.enter_context(private_runs(model))
        run_small = stack.enter_context(private_runs(small, parameters))
        stack.enter_context(asking(small, parameters))
        pair = _Pair(small, run_small, run_dense, kl, mask)

        def after_pass(done: int) -> None:
            tell("passes of distill", done, epochs)

        before, after = train(pair.losses, parameters, used, aside, epochs, lr, after_pass)
    reports = getattr(small, "alds_factors", {})
    if after < before:
        annotate(small, factors=reports | trained_reports(reports, small, model, "distilled"))
    if not pair.kl:
        before, after = math.sqrt(before), math.sqrt(after)
    return small, Distilled(before, after, bool(pair.kl))
