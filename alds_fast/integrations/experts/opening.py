"""Experts that lie in one parameter of a model of transformers, made layers."""

from __future__ import annotations

from torch import nn

from ...checks import check_model
from ...errors import ModelError
from ...layers import OpenedExperts, holds_experts, label, replace_layers, tied_names, why_experts_stay
from ..transformers_quantizer import keep_when_saved


def open_experts(model: nn.Module) -> nn.Module:
    """A copy of a mixture-of-experts model in which every expert's projections are ordinary linear layers.

    transformers 5 holds all experts of a block in one parameter (Mixtral, Qwen3-MoE, gpt-oss, DeepSeek-V3, ...), and
    calls no layer with an expert's tokens. In the copy they are layers ``....experts.E.up`` (gate and up in one, where
    there is a gate) and ``....experts.E.down``, so that each is decomposed by itself, with moments of the tokens that
    are routed to it. Outputs are equal: to the last bit to those of experts_implementation="eager" where a class keeps
    its weights as (experts, outputs, inputs) and sums in the type of its input, else up to rounding. An expert that no
    token reaches is not called, as a layer that data do not reach.

    The copy runs expert after expert, as "eager" does, which on a GPU is slower than "grouped_mm" and cannot be
    exported. ``save_pretrained`` and :func:`alds_fast.from_pretrained` keep it as it is; :func:`alds_fast.load` takes
    ``open_experts(model)`` for the dense model.

    Args:
        model: a model with such mixtures; it is not changed. Those of a kind that is not known stay as they are, and
            the plan names the reason. Weights are copied once; ``model = open_experts(model)`` gives the first ones
            back.

    Returns:
        The copy.

    Raises:
        ModelError: there is no mixture of experts that can be opened, with the reasons; experts are tied to other
            weights; or the model cannot be copied.

    Example:
        >>> from transformers import MixtralConfig, MixtralForCausalLM
        >>> config = MixtralConfig(vocab_size=8, hidden_size=8, intermediate_size=6, num_hidden_layers=1,
        ...     num_attention_heads=1, num_key_value_heads=1, num_local_experts=2)
        >>> opened = open_experts(MixtralForCausalLM(config))
        >>> opened.model.layers[0].mlp.experts.get_submodule("1.up")
        Linear(in_features=8, out_features=12, bias=False)
    """
    check_model(model)
    held = {name: module for name, module in model.named_modules() if holds_experts(module)}
    reasons = {name: why_experts_stay(module) for name, module in held.items()}
    chosen = [name for name, reason in reasons.items() if reason is None]
    if not chosen:
        why = "; ".join(f"{label(name)}: {reason}" for name, reason in list(reasons.items())[:1])
        raise ModelError(f"no experts that can be opened: {why or 'the model has none in one parameter'}")
    _check_untied(model, chosen)
    if chosen == [""]:
        return OpenedExperts(model)
    opened = replace_layers(model, {name: OpenedExperts(held[name]) for name in chosen})
    keep_when_saved(opened)
    return opened


def _check_untied(model: nn.Module, chosen: list[str]) -> None:
    """ModelError if weights of the experts are those of other layers too."""
    tied = tied_names(model)
    for name in chosen:
        for parameter in model.get_submodule(name).parameters():
            if id(parameter) in tied:
                raise ModelError(f"{label(name)}: its weights are tied, {tied[id(parameter)]}; give it a copy of them")
