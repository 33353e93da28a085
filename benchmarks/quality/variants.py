"""The ways to compress a network that the suite compares: ours by several criteria and norms, and the baselines."""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

import alds_fast as alds

from .networks import Network

REFITTED = "sensitivity p=2", "output p=4", "output p=2", "frobenius p=4", "svd-energy", "l-rank", "pca"
WITHOUT_PIVOTS = "frobenius p=4", "output p=4", "output p=2", "sensitivity p=2"


class FilterThreshold:
    """Magnitude filter thresholding, as a variant (model, share, seed) -> model."""

    def __init__(self, example_inputs: Any, scope: str) -> None:
        self.example_inputs, self.scope = example_inputs, scope
        self.name = f"alds.filter_threshold {scope}"

    def __call__(self, model: nn.Module, share: float, seed: int) -> nn.Module:
        return alds.filter_threshold(model, params=share, example_inputs=self.example_inputs, scope=self.scope)


def variants(include: str | None, example_inputs: Any, sensitivity: Any = True) -> dict[str, Any]:
    """By name; without data first, then those that are given calibration data.

    ``sensitivity`` is that of analyze: True, or what of the network's output matters.
    """
    common = {"include": include} if include else {}
    seeing = {**common, "data": True, "sensitivity": sensitivity}
    options: dict[str, Any] = {}
    for criterion in ("frobenius", "operator"):
        for p in (math.inf, 8.0, 4.0, 2.0, 1.0):
            options[f"{criterion} p={p:g}"] = {**common, "criterion": criterion, "p": p}
    options["frobenius p=inf encode"] = {**common, "p": math.inf, "schemes": (0,)}
    options["frobenius p=inf one slice"] = {**common, "p": math.inf, "groups": (1,)}
    for method in ("svd", "svd-energy", "svd-nuclear", "l-rank", "uniform", "alds-heuristic"):
        options[method] = {**common, "method": method}
    options["alds-heuristic reference"] = {**common, "method": "alds-heuristic", "criterion": "reference"}
    if isinstance(example_inputs, torch.Tensor) and include is None:
        for scope in ("global", "uniform"):
            options[f"filters {scope}"] = FilterThreshold(example_inputs, scope)
    for criterion in ("output", "sensitivity"):
        for p in (math.inf, 8.0, 4.0, 2.0, 1.0):
            options[f"{criterion} p={p:g}"] = {**seeing, "criterion": criterion, "p": p}
    options["output p=inf no bias correction"] = {**seeing, "criterion": "output", "p": math.inf,
                                                "bias_correction": False}  # fmt: skip
    options["pca"] = {**seeing, "method": "pca"}
    for name in WITHOUT_PIVOTS:
        options[f"{name} no pivots"] = {**options[name], "pivots": False}
    for name in REFITTED:
        options[f"{name} refit"] = {**options[name], "refit": True}
    return options


def chosen(network: Network, patterns: Sequence[str]) -> dict[str, Any]:
    """The variants of a network whose names match one of the shell-style patterns."""
    every = variants(network.include, network.example_inputs, network.sensitivity)
    return {name: options for name, options in every.items() if any(fnmatch.fnmatch(name, p) for p in patterns)}
