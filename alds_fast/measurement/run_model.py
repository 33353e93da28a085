"""What a model's layers are called with, and how long calls take when the sides take turns."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from ..errors import ArgumentError


def _check_example(example_inputs: Any, name: str) -> None:
    named = isinstance(example_inputs, Mapping) and all(isinstance(name, str) for name in example_inputs)
    if not named and not isinstance(example_inputs, Tensor | tuple | list):
        remedy = '; of text pass tokenizer(text, return_tensors="pt")' if isinstance(example_inputs, str) else ""
        raise ArgumentError(
            f"{name} is a {type(example_inputs).__name__}: expected a tensor, a tuple or list of positional arguments, "
            f"or a dict of keyword arguments{remedy}"
        )


def call_model(model: nn.Module, example_inputs: Any, name: str = "example_inputs") -> Any:
    """``model(x)`` for a tensor, ``model(*x)`` for a tuple or list, ``model(**x)`` for a mapping of names.

    ArgumentError, which calls the inputs ``name``, for anything else. Run it inside :func:`inference`.
    """
    _check_example(example_inputs, name)
    if isinstance(example_inputs, Tensor):
        return model(example_inputs)
    return model(**example_inputs) if isinstance(example_inputs, Mapping) else model(*example_inputs)


@contextmanager
def attribute_set(objects: Iterable[Any], name: str, value: Any) -> Iterator[None]:
    """The attribute has that value on all objects; what it was on each is put back at the end."""
    before = [(obj, getattr(obj, name)) for obj in objects]
    try:
        for obj, _ in before:
            setattr(obj, name, value)
        yield
    finally:
        for obj, old in before:
            setattr(obj, name, old)


@contextmanager
def exact_products() -> Iterator[None]:
    """No tf32 or bfloat16 inside float32 products, nor in the place of them by ``torch.autocast``."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        with ExitStack() as stack:
            for kind in ("cpu", "cuda"):
                if torch.is_autocast_enabled(kind):
                    stack.enter_context(torch.autocast(kind, enabled=False))
            yield
    finally:
        torch.set_float32_matmul_precision(before)


@contextmanager
def inference(model: nn.Module) -> Iterator[None]:
    """The model in evaluation mode, without gradients; every module's ``training`` flag is put back at the end.

    The flags are set directly, so that a ``train`` method of the model's own (one that merges weights, say) is not
    called.
    """
    with attribute_set(model.modules(), "training", False), torch.no_grad():
        yield


@contextmanager
def without_nested_tensors(*models: nn.Module) -> Iterator[None]:
    """Transformer encoders work on padded tensors, not on nested ones, whose rows are other tokens to each layer."""
    encoders = [m for model in models for m in model.modules() if isinstance(m, nn.TransformerEncoder)]
    with attribute_set(encoders, "use_nested_tensor", False):
        yield


@contextmanager
def without_fast_paths() -> Iterator[None]:
    """Transformer layers and attention of torch call their linear layers, whose weights they else read by name."""
    mha = torch.backends.mha
    before = mha.get_fastpath_enabled()
    mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        mha.set_fastpath_enabled(before)


def device_of(model: nn.Module) -> torch.device:
    """Where the model's first parameter is; the CPU without any."""
    return next((p.device for p in model.parameters()), torch.device("cpu"))


def first_input(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """What a hooked layer was called with; None if it was given under another name than torch's ``input``."""
    return args[0] if args else kwargs.get("input")


def output_tensors(output: Any) -> list[Tensor]:
    """The tensors of a model's output, in their order, those of transformers' mappings too."""
    parts = list(output.values()) if isinstance(output, Mapping) else output
    return [leaf for leaf in tree_leaves(parts) if isinstance(leaf, Tensor)]
