"""What compressed models carry with them: plan, report of the factors, table of a deployment."""

from __future__ import annotations

from typing import Any

from torch import nn


def annotate(model: nn.Module, **notes: Any) -> None:
    """Hang notes on a model, as ``model.alds_NAME``, past whatever ``__setattr__`` its class has."""
    for name, value in notes.items():
        object.__setattr__(model, f"alds_{name}", value)
