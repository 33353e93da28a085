"""A word where torchao's ``quantize_``, which looks for ``nn.Linear``, passes low-rank layers by."""

from __future__ import annotations

import functools
import sys
import warnings
from typing import Any

from torch import nn

from ..import_hooks import when_imported
from ..layers import LowRankLinear, label

_API = "torchao.quantization.quant_api"


def warn_of_low_rank(model: nn.Module) -> None:
    """Warn that ``quantize_`` leaves the model's low-rank linear layers as they are, if it has any."""
    names = [label(name) for name, module in model.named_modules() if isinstance(module, LowRankLinear)]
    if names:
        warnings.warn(
            f"quantize_ leaves {len(names)} low-rank layers as they are, for example {names[0]}; quantise "
            f"alds_fast.to_plain(model) instead",
            stacklevel=3,
        )


def _warning(original: Any) -> Any:
    @functools.wraps(original)
    def quantize_(model: nn.Module, *args: Any, **kwargs: Any) -> Any:
        warn_of_low_rank(model)
        return original(model, *args, **kwargs)

    return quantize_


def _teach_torchao() -> None:
    """Change ``quantize_`` in every module of torchao that has been imported."""
    original = getattr(sys.modules[_API], "quantize_", None)
    if original is None:
        return
    changed = _warning(original)
    for name, module in list(sys.modules.items()):
        if name.partition(".")[0] == "torchao" and vars(module).get("quantize_") is original:
            vars(module)["quantize_"] = changed


when_imported(_API, _teach_torchao)
