"""Ours, stage after stage."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn

import alds_fast as alds

from .peers import PASSES
from .setting import LENGTH, Setting

OWN = 320  # sequences that the model writes itself


def analysis(setting: Setting) -> alds.Analysis:
    """With data and the gradients of the Kullback-Leibler divergence; one slice, as the peers have it."""
    return alds.analyze(
        setting.model, data=setting.calibration, sensitivity="kl", include=setting.include, groups=(1,), schemes=(0,)
    )


def with_curves(setting: Setting, analysis: alds.Analysis, criterion: str) -> alds.Analysis:
    """The analysis, which keeps the errors of all ranks by the criterion: plans of all shares and kinds use them."""
    analysis.plan(params=setting.share_of_all(0.5), criterion=criterion, pivots=False)
    return analysis


def planned(setting: Setting, share: float, *analyses: alds.Analysis, refit: bool = False, **options: Any) -> nn.Module:
    """The exact allocation by a criterion, the norm its default; by the last of ``analyses``, which has curves."""
    plan = analyses[-1].plan(params=setting.share_of_all(share), **options)
    return plan.apply(setting.model, refit=setting.calibration if refit else None)


def refined(setting: Setting, share: float, small: nn.Module) -> nn.Module:
    """Blocks trained to return what the dense ones return, in as many passes as AA-SVD's."""
    return alds.refine(small, setting.model, setting.calibration, epochs=PASSES)[0]


def tuned(setting: Setting, share: float, small: nn.Module) -> nn.Module:
    """All low-rank layers and norms trained at once towards the dense network's logits."""
    return alds.distill(small, setting.model, setting.calibration)[0]


def tuned_on_own_text(setting: Setting, share: float, small: nn.Module) -> nn.Module:
    """As :func:`tuned`: one pass over what the dense network writes and the calibration text, products in bfloat16."""
    writer = copy.deepcopy(setting.model).bfloat16()
    text = alds.own_text(writer, setting.calibration, count=OWN, length=LENGTH)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        return alds.distill(small, setting.model, [*text, *setting.calibration], epochs=1, lr=2e-4)[0]
