"""A word where ``quantize_`` of torchao and ``quantize_dynamic`` of torch, which look for ``nn.Linear``, pass by.

They leave low-rank layers as they are.
"""

from __future__ import annotations

import functools
import sys
import warnings
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from ..import_hooks import when_imported
from ..layers import LowRankLinear, label

_TORCHAO = "torchao.quantization.quant_api"
_TORCH = "torch.ao.quantization.quantize"


def warn_of_low_rank(model: nn.Module, function: str, below: Iterable[str] = ("",)) -> None:
    """Warn that ``function`` leaves the low-rank linear layers as they are, if the model has any.

    ``below``: names of the modules that it is to quantise; "" for the whole model.
    """
    low = [name for name, module in model.named_modules() if isinstance(module, LowRankLinear)]
    names = [name for name in low if any(part in ("", name) or name.startswith(f"{part}.") for part in below)]
    if names:
        warnings.warn(
            f"{function} leaves {len(names)} low-rank layers as they are, for example {label(names[0])}; quantise "
            f"alds_fast.to_plain(model) instead",
            stacklevel=3,
        )


def _warning(original: Any) -> Any:
    @functools.wraps(original)
    def quantize_(model: nn.Module, *args: Any, **kwargs: Any) -> Any:
        warn_of_low_rank(model, "quantize_")
        return original(model, *args, **kwargs)

    return quantize_


def _warning_of_dynamic(original: Any) -> Any:
    @functools.wraps(original)
    def quantize_dynamic(
        model: nn.Module, qconfig_spec: Any = None, dtype: torch.dtype = torch.qint8, *args: Any, **kwargs: Any
    ) -> Any:
        warn_of_low_rank(model, "quantize_dynamic", _dynamic_parts(qconfig_spec, dtype))
        return original(model, qconfig_spec, dtype, *args, **kwargs)

    return quantize_dynamic


def _dynamic_parts(qconfig_spec: Any, dtype: torch.dtype) -> list[str]:
    """The parts of a model in which ``quantize_dynamic`` quantises linear layers; [""] for all of it."""
    if qconfig_spec is None:
        return [""] if dtype in (torch.qint8, torch.float16) else []
    return [""] if nn.Linear in qconfig_spec else [part for part in qconfig_spec if isinstance(part, str)]


def _teach(module: str, name: str, changed: Any) -> None:
    """Change that function in every module of its package that has been imported."""
    original = getattr(sys.modules[module], name, None)
    if original is None:
        return
    package, new = module.partition(".")[0], changed(original)
    for imported, values in list(sys.modules.items()):
        if imported.partition(".")[0] == package and vars(values).get(name) is original:
            vars(values)[name] = new


when_imported(_TORCHAO, functools.partial(_teach, _TORCHAO, "quantize_", _warning))
when_imported(_TORCH, functools.partial(_teach, _TORCH, "quantize_dynamic", _warning_of_dynamic))
