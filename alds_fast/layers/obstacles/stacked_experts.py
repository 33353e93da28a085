"""Mixtures of experts whose weights lie in one parameter: which can be opened, and why the others cannot.

transformers 5 marks such a module by a decorator, ``use_experts_implementation``. The flags that this sets say all of
the forward: a projection up, the class's gate (or its activation), a projection down, and the router's weights.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter
from torch.nn.utils import parametrize

from ..shared_weights import has_plain_type

_DECORATOR = "transformers.integrations.moe"
_FLAGS = ("has_gate", "has_bias", "has_post_expert_norm", "is_transposed", "is_concatenated")
_FORWARDS = ("eager", "grouped_mm", "batched_mm", "deepgemm", "sonicmoe", None)  # which compute the same


def is_decorated(module: nn.Module) -> bool:
    """Whether transformers' decorator has made the module's forward."""
    code = getattr(type(module).forward, "__globals__", {})
    return code.get("__name__") == _DECORATOR and all(isinstance(vars(module).get(flag), bool) for flag in _FLAGS)


def holds_experts(module: nn.Module) -> bool:
    """Whether the module is a mixture of experts with their weights in one parameter."""
    if is_decorated(module):
        return True
    tensors = [p for p in module._parameters.values() if p is not None and not isinstance(p, UninitializedParameter)]
    return "Experts" in type(module).__name__ and any(p.dim() == 3 for p in tensors)


def projections(module: Any) -> tuple[str, str]:
    """Under which names a decorated module has the weights of its two projections."""
    return "gate_up_proj" if module.has_gate else "up_proj", "down_proj"


def oriented_experts(module: Any, name: str) -> Tensor:
    """The weights of one of the projections, (experts, outputs, inputs), a view."""
    weight: Tensor = getattr(module, name).detach()
    return weight.mT if module.is_transposed else weight


def why_not_opened(module: nn.Module) -> str | None:
    """Why the experts that such a module holds cannot be made layers; None if they can.

    Hooks are not looked at.
    """
    kind = type(module).__name__
    if parametrize.is_parametrized(module):
        return f"{kind} is parametrized; parametrize.remove_parametrizations first"
    if not is_decorated(module):
        return f"{kind} computes with its experts' weights in a way of its own, which open_experts does not know"
    decorated: Any = module
    if decorated.has_post_expert_norm:
        return f"{kind} has a norm after each expert, which open_experts does not know"
    if vars(module).get("_is_expert_parallel"):
        return f"{kind} is spread over processes (expert parallelism); load the model without"
    forward = getattr(decorated.config, "_experts_implementation", None)
    if forward not in _FORWARDS:
        return f"{kind} runs experts_implementation={forward!r}, which open_experts does not know; load it with 'eager'"
    return _reason_of_tensors(decorated)


def _reason_of_tensors(module: Any) -> str | None:
    """What of its tensors is not as its flags say."""
    names = projections(module)
    expected = {*names, *(f"{name}_bias" for name in names if module.has_bias)}
    held = {name: p for name, p in module.named_parameters() if p is not None}
    if held.keys() != expected or any(True for _ in module.buffers()):
        return f"{type(module).__name__} has parameters or buffers beside {', '.join(sorted(expected))}"
    for name, p in held.items():
        if p.dtype not in (torch.float16, torch.bfloat16, torch.float32, torch.float64) or not has_plain_type(p):
            return f"its {name} is no plain tensor of real floating point; open the experts before it is made one"
    return None if _sizes_agree(module, held) else f"the shapes of its parameters do not fit together: {_sizes(held)}"


def _sizes(held: Mapping[str, Tensor]) -> str:
    return ", ".join(f"{name} {tuple(p.shape)}" for name, p in held.items())


def _sizes_agree(module: Any, held: Mapping[str, Tensor]) -> bool:
    """Whether all parameters are of so many experts, and the projection down gives what the other one takes."""
    if any(p.dim() != (2 if name.endswith("_bias") else 3) for name, p in held.items()):
        return False
    up, down = (oriented_experts(module, name).shape for name in projections(module))
    biases = all(held[f"{n}_bias"].shape == s[:2] for n, s in zip(projections(module), (up, down), strict=True)
                 if module.has_bias)  # fmt: skip
    return up[0] == down[0] == module.num_experts and up[2] == down[1] and biases
