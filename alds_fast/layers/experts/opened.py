"""A mixture of experts in which the projections of each expert are ordinary linear layers."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..obstacles import oriented_experts, projections
from .routed import calling_expert


class Gate(nn.Module):
    """What comes between the projections: the gate of the class that was opened, or its activation without one.

    It has the attributes of the opened module that are no tensors, which that gate reads.
    """

    def __init__(self, experts: Any) -> None:
        super().__init__()
        own = {name: value for name, value in vars(experts).items() if name[:1] != "_" and name != "training"}
        vars(self).update(own)
        self._modules.update(experts._modules)
        self.function: Callable[..., Tensor] | None = type(experts)._apply_gate if experts.has_gate else None

    def forward(self, input: Tensor) -> Tensor:
        activation: Any = self.act_fn if self.function is None else partial(self.function, self)
        output: Tensor = activation(input)
        return output


class Expert(nn.Module):
    """One expert's projections, ``up`` (of gate and up in one, where there is a gate) and ``down``."""

    def __init__(self, up: nn.Linear, down: nn.Linear) -> None:
        super().__init__()
        self.up, self.down = up, down

    def forward(self, input: Tensor, gate: nn.Module) -> Tensor:
        return self.down(gate(self.up(input)))


class OpenedExperts(nn.Module):
    """The same function as a mixture of experts whose weights lie in one parameter, expert after expert.

    Its children are named "0", "1", ...; each has the linear layers ``up`` and ``down``, with copies of the weights.
    Experts that get no token are not called. Sums go in the order of transformers' "eager" forward. Only for modules of
    which :func:`alds_fast.layers.why_not_opened` says None.
    """

    def __init__(self, experts: Any) -> None:
        super().__init__()
        self.num_experts = experts.num_experts
        for expert in range(self.num_experts):
            self.add_module(str(expert), Expert(*(_linear(experts, name, expert) for name in projections(experts))))
        self.gate = Gate(experts)
        self.train(experts.training)

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """``hidden_states`` (tokens, width); experts of each token and their weights, (tokens, experts of a token).

        An index of ``num_experts`` or more stands for none.
        """
        result = torch.zeros_like(hidden_states)
        for expert in top_k_index.unique().tolist():
            if expert < self.num_experts:
                place, rows = torch.where((top_k_index == expert).mT)
                with calling_expert(rows, len(hidden_states)):
                    y = self.get_submodule(str(expert))(hidden_states[rows], self.gate)
                y = y * top_k_weights[rows, place, None]
                result.index_add_(0, rows, y.to(result.dtype))
        return result


def _linear(experts: Any, name: str, expert: int) -> nn.Linear:
    """One projection of an expert, with memory of its own."""
    weight, bias = oriented_experts(experts, name)[expert], getattr(experts, f"{name}_bias", None)
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias is not None, device="meta")
    linear.weight = _own(weight, getattr(experts, name).requires_grad)
    if bias is not None:
        linear.bias = _own(bias.detach()[expert], bias.requires_grad)
    return linear


def _own(values: Tensor, requires_grad: bool) -> nn.Parameter:
    return nn.Parameter(values.clone(memory_format=torch.contiguous_format), requires_grad)
