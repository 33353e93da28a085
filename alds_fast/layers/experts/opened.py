"""A mixture of experts in which the projections of each expert are ordinary linear layers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..obstacles import oriented_experts, projections
from .routed import calling_expert


class Expert(nn.Module):
    """One expert's projections, ``up`` (of gate and up in one, where there is a gate) and ``down``."""

    def __init__(self, up: nn.Linear, down: nn.Linear) -> None:
        super().__init__()
        self.up, self.down = up, down

    def forward(self, input: Tensor, gate: Callable[[Tensor], Tensor]) -> Tensor:
        return self.down(gate(self.up(input)))


class OpenedExperts(nn.Module):
    """The same function as a mixture of experts whose weights lie in one parameter, expert after expert.

    Its children are named "0", "1", ...; each has the linear layers ``up`` and ``down``, with copies of the weights.
    Experts that get no token are not called. Sums go in the order of transformers' "eager" forward. Only for modules of
    which :func:`alds_fast.layers.why_experts_stay` says None.

    ``template`` is the opened module without its parameters: no child, so that nothing initialises or stores it. It
    has what comes between the projections, the gate of its class or its activation.
    """

    template: Any

    def __init__(self, experts: nn.Module) -> None:
        super().__init__()
        vars(self)["template"] = _without_parameters(experts)
        self.num_experts: int = self.template.num_experts
        for expert in range(self.num_experts):
            self.add_module(str(expert), Expert(*(_linear(experts, name, expert) for name in projections(experts))))
        self.train(experts.training)

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """``hidden_states`` (tokens, width); experts of each token and their weights, (tokens, experts of a token).

        An index of ``num_experts`` or more stands for none.
        """
        result, gate = torch.zeros_like(hidden_states), self._gate()
        for expert in top_k_index.unique().tolist():
            if expert < self.num_experts:
                place, rows = torch.where((top_k_index == expert).mT)
                with calling_expert(rows, len(hidden_states)):
                    y = self.get_submodule(str(expert))(hidden_states[rows], gate)
                y = y * top_k_weights[rows, place, None]
                result.index_add_(0, rows, y.to(result.dtype))
        return result

    def _gate(self) -> Callable[[Tensor], Tensor]:
        function: Callable[[Tensor], Tensor] = (
            self.template._apply_gate if self.template.has_gate else self.template.act_fn
        )
        return function

    def stacked(self) -> nn.Module:
        """The module that was opened, with the weights of the layers, all of which must be dense, in one parameter."""
        experts = _without_parameters(self.template)
        for name, layer in zip(projections(experts), ("up", "down"), strict=True):
            layers: list[Any] = [self.get_submodule(f"{i}.{layer}") for i in range(self.num_experts)]
            weights = [linear.weight.mT if experts.is_transposed else linear.weight for linear in layers]
            experts.register_parameter(name, _stack(weights))
            if experts.has_bias:
                experts.register_parameter(f"{name}_bias", _stack([linear.bias for linear in layers]))
        return experts.train(self.training)


def _without_parameters(experts: nn.Module) -> Any:
    """Another module of that class with the same attributes and children, and no parameters."""
    kind = type(experts)
    template = kind.__new__(kind)
    vars(template).update({**vars(experts), "_parameters": {}})
    return template


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


def _stack(parameters: list[Tensor]) -> nn.Parameter:
    return nn.Parameter(torch.stack([p.detach() for p in parameters]), parameters[0].requires_grad)
