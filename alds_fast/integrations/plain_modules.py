"""The plain form of a low-rank layer: an encoder and a decoder of torch's own types, which trace and script."""

from collections import OrderedDict
from collections.abc import Sequence
from typing import Any, Optional

import torch
from torch import Tensor, nn

from ..kernels import in_this_order
from ..layers import AbsentWeight, LowRankConv, LowRankConvTranspose, LowRankEmbedding, LowRankLayer


class SlicedLinear(nn.Module):
    """An ``nn.Linear`` for each of the equal slices of the last dimension, their outputs one after the other.

    x (..., sum of in_features) to (..., sum of out_features). The encoder of a low-rank linear layer with slices, in a
    form whose parameters every tool finds.
    """

    def __init__(self, slices: Sequence[nn.Linear]) -> None:
        super().__init__()
        self.slices = nn.ModuleList(slices)

    def forward(self, input: Tensor) -> Tensor:
        parts = input.chunk(len(self.slices), -1)
        outputs = []
        for i, linear in enumerate(self.slices):
            outputs.append(linear(parts[i]))
        return torch.cat(outputs, -1)


def _ordered(x: Tensor, order: Tensor, dim: int) -> Tensor:
    """The entries of a dimension, counted from the end, in another order."""
    return in_this_order(x, order) if dim == -1 else x.index_select(dim, order)


class OutputPivots(nn.Module):
    """A decoder that passes what it gets on as some of its outputs; ``rest`` computes the others.

    ``order``: for every output its place among these, then those; ``dim``: that of the channels, counted from the end.
    """

    order: Tensor
    bias: Tensor | None

    def __init__(self, rest: nn.Module, order: Tensor, bias: nn.Parameter | None, dim: int) -> None:
        super().__init__()
        self.rest, self.dim = rest, dim
        self.register_buffer("order", order)
        self.register_parameter("bias", bias)

    def forward(self, input: Tensor) -> Tensor:
        y = _ordered(torch.cat([input, self.rest(input)], self.dim), self.order, self.dim)
        bias = self.bias
        return y if bias is None else y + bias.reshape([-1] + [1] * (-1 - self.dim))


class InputPivots(nn.Module):
    """An encoder that adds what it computes from some of its inputs, by ``rest``, to ``count`` others.

    ``order``: which these others are, then those; ``dim``: that of the channels, counted from the end.
    """

    order: Tensor

    def __init__(self, rest: nn.Module, order: Tensor, count: int, dim: int) -> None:
        super().__init__()
        self.rest, self.count, self.dim = rest, count, dim
        self.register_buffer("order", order)

    def forward(self, input: Tensor) -> Tensor:
        ordered = _ordered(input, self.order, self.dim)
        left = len(self.order) - self.count
        return ordered.narrow(self.dim, 0, self.count) + self.rest(ordered.narrow(self.dim, self.count, left))


class TransposedHalves(nn.Sequential):
    """Encoder and decoder of a transposed convolution; ``output_size`` is taken as by ``nn.ConvTranspose2d``.

    ``encoder_axes``: those of the kernel that the encoder goes along; a half that takes a size is a transposed
    convolution, the other one of kernel 1.
    """

    __constants__ = ("ndim", "encoder_axes", "encoder_takes_size", "decoder_takes_size")

    def __init__(self, encoder: nn.Module, decoder: nn.Module, ndim: int, encoder_axes: list[int]) -> None:
        super().__init__()
        self.encoder, self.decoder = encoder, decoder
        self.ndim, self.encoder_axes = ndim, encoder_axes
        self.encoder_takes_size = isinstance(encoder, nn.modules.conv._ConvTransposeNd)
        self.decoder_takes_size = isinstance(decoder, nn.modules.conv._ConvTransposeNd)

    def forward(self, input: Tensor, output_size: Optional[list[int]] = None) -> Tensor:  # noqa: UP045 - for scripts
        if output_size is None:
            return self.decoder(self.encoder(input))
        size = output_size[-self.ndim :]
        if self.encoder_takes_size:
            axes = self.encoder_axes
            middle = self.encoder(
                input, [size[a] if a in axes else input.size(a - self.ndim) for a in range(self.ndim)]
            )
        else:
            middle = self.encoder(input)
        if self.decoder_takes_size:
            return self.decoder(middle, size)
        return self.decoder(middle)


def _linear(weight: nn.Parameter, bias: Tensor | None = None) -> nn.Linear:
    """The ``nn.Linear`` that holds these very parameters."""
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias is not None, device="meta")
    linear.weight = weight
    if bias is not None:
        linear.bias = bias  # type: ignore[assignment]
    return linear


def _halves(layer: LowRankLayer, bias: Tensor | None) -> tuple[nn.Module, nn.Module]:
    """Encoder and decoder, without what pivots add to them."""
    encoder, decoder = layer.encoder, layer.decoder
    if isinstance(layer, LowRankEmbedding):
        return layer.narrow_module(), _linear(decoder)
    if isinstance(layer, LowRankConv):
        return layer.half_modules(bias)
    if layer.slices == 1:
        return _linear(encoder), _linear(decoder, bias)
    blocks, trained = encoder.detach().chunk(layer.slices), encoder.requires_grad
    return SlicedLinear([_linear(nn.Parameter(block.clone(), trained)) for block in blocks]), _linear(decoder, bias)


def plain_module(layer: LowRankLayer) -> nn.Sequential:
    """The same function as an encoder and a decoder of torch's types, which hold this very layer's parameters.

    It has the attributes of the dense layer, and ``weight`` as the layer has it. The encoder of a linear layer with
    slices is one ``nn.Linear`` for each slice, with a copy of its part of the parameter.
    """
    bias: Any = layer.bias
    dim = -1 - len(layer.weight_shape.kernel)
    encoder, decoder = _halves(layer, None if layer.pivots == "output" else bias)
    if layer.pivots == "output":
        decoder = OutputPivots(decoder, layer.order, bias, dim)
    elif layer.pivots:
        encoder = InputPivots(encoder, layer.order, layer.groups_of_encoder * layer.rank, dim)
    plain: Any = nn.Sequential(OrderedDict(encoder=encoder, decoder=decoder))
    if isinstance(layer, LowRankConvTranspose):
        plain = TransposedHalves(encoder, decoder, layer.ndim, layer.encoder_axes)
    plain.train(layer.training)
    for name in layer.dense_attributes:
        setattr(plain, name, getattr(layer, name))
    plain.weight = AbsentWeight(f"the plain form of {type(layer).__name__}", layer.stored_shape, plain)
    return plain
