"""The classes by which transformers loads and saves compressed models, registered when this module is imported.

It is imported only where transformers is: :func:`alds_fast.integrations.transformers_quantizer.loader_module`.
"""

from __future__ import annotations

import json
from typing import Any

import torch
from torch import Tensor, nn
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from ..errors import ModelError
from ..layers import LowRankLayer, MergedLinears, narrowed_sizes, padded
from ..linalg import own_memory
from .stored_layers import METHOD, fields_of_layers, format_version, has_opened_experts, read_layers, read_narrowed
from .transformers_layers import put_low_rank_layers, put_opened_experts, set_module, stack_opened_experts


@register_quantization_config(METHOD)
class AldsFastConfig(QuantizationConfigMixin):
    """``layers``: by module name, or by that of the stored weight, what ``layer_fields`` gives.

    ``narrowed``: the same of what :func:`alds_fast.layers.narrowed_sizes` gives.

    ``opened_experts``: all mixtures of experts that can be opened are. ``plan``: what the model was compressed by, of
    JSON's types.
    """

    opened_experts = False
    narrowed: Any = None
    plan: Any = None

    def __init__(
        self, layers: Any = None, version: Any = 1, opened_experts: bool = False, narrowed: Any = None,
        plan: Any = None, **kwargs: Any,
    ) -> None:  # fmt: skip
        self.quant_method = METHOD
        if opened_experts:
            self.opened_experts = True
        if narrowed:
            self.narrowed = read_narrowed(narrowed)
        if plan:
            self.plan = plan
        self.layers = read_layers(layers, version)
        self.version = max(version, format_version(self.layers, narrowed))


@register_quantizer(METHOD)
class AldsFastLoader(HfQuantizer):
    """Puts the low-rank layers in the place of the dense ones before the weights are read."""

    requires_calibration = True  # nothing is compressed while it is loaded

    def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> None:
        if self.quantization_config.opened_experts:
            put_opened_experts(model)
        put_low_rank_layers(model, self.quantization_config.layers, self.quantization_config.narrowed or {})

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        # These are plain floating-point layers: what transformers forbids quantized models (half, float, training)
        # they can do.
        for module in _models(model):
            module.config._is_quantized = False
        model.is_quantized = False
        for tensor in [*model.parameters(), *model.buffers()]:
            tensor.data = own_memory(tensor.data)
        describe(model)
        return model

    def update_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """The type asked for: low-rank layers take any."""
        return dtype

    def get_state_dict_and_metadata(self, model: Any) -> tuple[dict[str, Tensor], dict[str, str]]:
        """What is saved, before it is: the low-rank layers that are there, each marked as in :func:`mark_state`."""
        if any(isinstance(module, MergedLinears) for module in model.modules()):
            raise ModelError("layers merged by deploy cannot be saved; save the model that was given to deploy")
        model.config.quantization_config = _config_of(model)
        return mark_state(model), {}

    def _dequantize(self, model: Any, dtype: Any = None) -> Any:
        for name in fields_of_layers(model):
            set_module(model, name, model.get_submodule(name).to_dense())
        for name in narrowed_sizes(model):
            set_module(model, name, padded(model.get_submodule(name)))
        stack_opened_experts(model)
        dtype = getattr(torch, dtype) if isinstance(dtype, str) else dtype  # as saving leaves it in the config
        return model if dtype is None else model.to(dtype)

    def is_serializable(self, *args: Any, **kwargs: Any) -> bool:
        """That they can be saved."""
        return True

    @property
    def is_trainable(self) -> bool:
        """That they can be trained."""
        return True

    @property
    def is_compileable(self) -> bool:
        """That torch.compile takes them."""
        return True


def mark_state(model: nn.Module) -> dict[str, Tensor]:
    """The state dict, with one value in the place of every dense weight that is not there.

    A loader that does not know low-rank layers would otherwise leave that weight random. So it refuses the shape.
    """
    low = {name: module for name, module in model.named_modules() if isinstance(module, LowRankLayer)}
    marks = {f"{name}.weight": layer.encoder.new_zeros([1] * len(layer.weight_shape.weight))
             for name, layer in low.items()}  # fmt: skip
    return {**model.state_dict(), **marks}


def describe(model: nn.Module) -> None:
    """Make the models of transformers in it say, in their configs and when they are saved, which layers are low-rank,
    whether experts are opened, and by which plan.

    Only the outermost models' configs say it, for those of their parts are in these.
    """
    inner = {id(part) for outer in _models(model) for part in _models(outer) if part is not outer}
    for module in _models(model):
        config = _config_of(module)
        if config.layers or config.opened_experts or config.narrowed:
            module.hf_quantizer = AldsFastLoader(config, pre_quantized=True)
            if id(module) not in inner:
                module.config.quantization_config = _config_of(module)


def _config_of(model: nn.Module) -> AldsFastConfig:
    experts, narrowed, plan = has_opened_experts(model), narrowed_sizes(model), vars(model).get("alds_plan")
    known = None if plan is None else json.loads(plan.to_json())
    return AldsFastConfig(fields_of_layers(model), opened_experts=experts, narrowed=narrowed, plan=known)


def _models(model: nn.Module) -> list[Any]:
    """The models of transformers that it consists of, itself included."""
    from transformers import PreTrainedModel  # not there yet while transformers.quantizers is imported

    return [module for module in model.modules() if isinstance(module, PreTrainedModel)]
