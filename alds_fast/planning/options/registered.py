"""Whether what users' registered functions gave computes what their modules do."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from ...errors import ModelError
from ...layers import REGISTERED, label
from ...measurement import output_tensors, private_runs

SAME_VALUES = 1e-3  # relative: what another order of operations may change


def check_registered(given: nn.Module, model: nn.Module, inputs: Any, called: str) -> None:
    """ModelError unless what registered functions gave returns on the inputs, if any, what the modules return."""
    names = [name for name, module in model.named_modules() if REGISTERED in vars(module)]
    if inputs is None or not names:
        return
    dense, other = (_returned(net, names, inputs, called) for net in (given, model))
    for name, outputs in dense.items():
        for a, b in zip(outputs, other.get(name, ()), strict=False):
            near = max(SAME_VALUES, 4 * torch.finfo(a.dtype).eps) * float(a.double().norm())
            if a.shape != b.shape or not float((a.double() - b.double()).norm()) <= near:
                raise ModelError(
                    f"layer {label(name)}: what its registered function gave returns something else on {called} than "
                    f"the {type(given.get_submodule(name)).__name__}; mend it (a Linear's weight is outputs x inputs)"
                )


def _returned(net: nn.Module, names: Iterable[str], inputs: Any, called: str) -> dict[str, list[Tensor]]:
    found: dict[str, list[Tensor]] = {}
    with ExitStack() as hooks, private_runs(net) as run:
        for name in names:

            def note(module: nn.Module, args: Any, y: Any, name: str = name) -> None:
                found.setdefault(name, [t.detach().clone() for t in output_tensors(y) if t.is_floating_point()])

            hooks.callback(net.get_submodule(name).register_forward_hook(note).remove)
        run(inputs, 1, called)
    return found
