"""Ours, stage after stage."""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import alds_fast as alds

from .peers import PASSES
from .setting import Setting
from .statistics import next_token_loss

EPOCHS, RATE = 2, 1e-4  # of the tuning of all layers at once


def analysis(setting: Setting) -> alds.Analysis:
    """With data and the gradients of the Kullback-Leibler divergence; one slice, as the peers have it."""
    return alds.analyze(
        setting.model, data=setting.calibration, sensitivity="kl", include=setting.include, groups=(1,), schemes=(0,)
    )


def with_curves(setting: Setting, analysis: alds.Analysis, criterion: str) -> alds.Analysis:
    """The analysis, which keeps the errors of all ranks by the criterion: plans of all shares and kinds use them."""
    analysis.plan(params=setting.share_of_all(0.5), criterion=criterion, pivots=False)
    return analysis


def planned(
    setting: Setting, share: float, *analyses: alds.Analysis, criterion: str, pivots: bool, refit: bool = False
) -> nn.Module:
    """The exact allocation by a criterion, the norm its default; by the last of ``analyses``, which has curves."""
    plan = analyses[-1].plan(params=setting.share_of_all(share), criterion=criterion, pivots=pivots)
    return plan.apply(setting.model, refit=setting.calibration if refit else None)


def rate(share: float) -> float:
    """Of refinement: 2e-4, and 5e-4 where so much is cut that larger steps were better."""
    return 2e-4 if share > 0.7 else 5e-4


def refined(setting: Setting, share: float, small: nn.Module) -> nn.Module:
    """Blocks trained to return what the dense ones return, in as many passes as AA-SVD's."""
    return alds.refine(small, setting.model, setting.calibration, epochs=PASSES, lr=rate(share))[0]


def tuned(setting: Setting, share: float, small: nn.Module) -> nn.Module:
    """All low-rank layers and norms trained at once, by ``alds_fast.retrain``, towards the dense network's logits.

    2 epochs over the windows of calibration, AdamW with 1e-4 and then 3e-5; the text's own tokens count nothing.
    """
    return alds.retrain(
        setting.model, keep=setting.share_of_all(share), epochs=EPOCHS,
        loader=[(batch, batch) for batch in setting.calibration],
        loss=lambda output, tokens: next_token_loss(output.logits, tokens), distill=1.0, distill_loss=divergence,
        optimizer=lambda net: torch.optim.AdamW(trained(net), lr=RATE, weight_decay=0.0),
        scheduler=lambda optimizer: torch.optim.lr_scheduler.LambdaLR(optimizer, lambda epoch: 0.3**epoch),
        compress=lambda model, keep, cycle: _asking(small),
    ).model  # fmt: skip


def divergence(output: Any, teacher: Any) -> Tensor:
    """Mean Kullback-Leibler divergence of the next tokens' probabilities from the dense network's."""
    student, wanted = (o.logits.flatten(0, 1).log_softmax(-1) for o in (output, teacher))
    return F.kl_div(student, wanted, reduction="batchmean", log_target=True)


def trained(net: nn.Module) -> list[nn.Parameter]:
    """The parameters that ask for a gradient."""
    return [p for p in net.parameters() if p.requires_grad]


def _asking(small: nn.Module) -> nn.Module:
    """A copy in which low-rank layers, biases and norms ask for gradients, and embeddings do not."""
    net = copy.deepcopy(small)
    low = [m for m in net.modules() if isinstance(m, alds.LowRankLinear)]
    chosen = {id(p) for m in low for p in m.parameters()} | {id(p) for p in net.parameters() if p.dim() == 1}
    for p in net.parameters():
        p.requires_grad_(id(p) in chosen)
    return net
