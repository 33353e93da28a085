"""Subclasses of torch's Linear in other libraries that compute the same in a forward of their own."""

from __future__ import annotations

from torch import nn

from .folded import with_parameters

_SAME = {("transformers", "FalconLinear"), ("timm", "Linear")}


def computes_the_same(module: nn.Module) -> bool:
    """Whether it is one of these classes, by its name."""
    return isinstance(module, nn.Linear) and (type(module).__module__.split(".")[0], type(module).__name__) in _SAME


def as_linear(module: nn.Module) -> nn.Module:
    """torch's Linear with its parameters."""
    return with_parameters(module, nn.Linear)
