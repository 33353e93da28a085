"""Low-rank layers: a grouped encoder, then a decoder, as plain trainable modules of two tensors and a bias."""

from __future__ import annotations

import math
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.fx import Proxy

from ..errors import BackendError, ModelError, WeightError
from ..linalg import (
    Decomposition,
    Pivots,
    WeightShape,
    batched_rsvd,
    decoder_weight,
    factors_to_weights,
    index_count,
    matrix_shape,
    own_memory,
    permute_weight,
    pivot_factors,
    slice_factors,
    weights_to_dense,
    with_identity,
)
from .absent_weight import AbsentWeight


class LowRankLayer(nn.Module):
    """Base of the low-rank layers.

    Attributes:
        encoder, decoder: parameters, shapes by :meth:`alds_fast.linalg.Decomposition.factor_shapes`.
        bias: parameter (out_channels,) or None.
        weight: stands for the dense weight, which is not there: shape, type and device, see AbsentWeight.
        weight_shape: the dense weight that they replace.
        scheme, slices, rank: the fold, the number of channel slices and the rank of each.
        pivots: "output" or "input" for factors without an identity (:mod:`alds_fast.linalg.pivots`), "" for plain ones.
        order: with pivots a buffer of indices, int64: of output pivots for every output its place among all pivots
            followed by all others, (out_channels,); of input pivots which channels these are, (in_channels,).
        backend: "auto", "fused", "fused-first" or "two-op", see :mod:`alds_fast.kernels.functional`; deploy sets it.
        in_order: whether output pivots and the others are the outputs one after the other, so that nothing is put in
            another order; deploy sets it.
    """

    bias: Tensor | None
    order: Tensor
    pivots: Pivots = ""
    backend: str = "auto"
    in_order: bool = False
    dense_attributes: tuple[str, ...]  # those of the dense layer that are not tensors

    def __init__(
        self,
        shape: WeightShape,
        decomposition: Decomposition,
        bias: bool,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
    ) -> None:
        super().__init__()
        encoder, decoder = decomposition.check(shape).factor_shapes(shape)
        self.weight_shape, (self.scheme, self.slices, self.rank, self.pivots) = shape, decomposition
        if self.pivots:
            indices = index_count(shape, self.pivots)
            self.register_buffer("order", torch.empty(indices, device=device, dtype=torch.int64))
        self.encoder = nn.Parameter(torch.empty(encoder, device=device, dtype=dtype))
        self.decoder = nn.Parameter(torch.empty(decoder, device=device, dtype=dtype))
        if bias:
            self.bias = nn.Parameter(torch.empty(shape.out_channels, device=device, dtype=dtype))
        else:
            self.register_parameter("bias", None)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise like ``nn.Linear`` and ``nn.Conv2d`` do, each factor by its own fan-in; pivots are the first."""
        self.reset_order()
        for factor in (self.encoder, self.decoder):
            nn.init.kaiming_uniform_(factor, a=math.sqrt(5))
        if self.bias is not None:
            bound = 1 / math.sqrt(math.prod(self.decoder.shape[1:]))
            nn.init.uniform_(self.bias, -bound, bound)

    def reset_order(self) -> None:
        """Take the first outputs, or channels of all slices, for pivots."""
        if self.pivots:
            self.order.copy_(torch.arange(len(self.order), device=self.order.device))

    @property
    def groups_of_encoder(self) -> int:
        """Slices of all groups of a convolution."""
        return self.weight_shape.conv_groups * self.slices

    def __getattr__(self, name: str) -> Any:
        if name == "weight":
            return AbsentWeight(type(self).__name__, self.stored_shape, self)
        return super().__getattr__(name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "weight":
            if isinstance(value, AbsentWeight) and value.stands_for(self):
                return
            raise AttributeError(
                f"{type(self).__name__} has no dense weight to set; set .encoder and .decoder, or put layer.to_dense() "
                f"in its place and set the weight of that"
            )
        if not isinstance(getattr(type(self), name, None), property):
            super().__setattr__(name, value)
        elif value != getattr(self, name):
            raise AttributeError(
                f"{type(self).__name__}.{name} is {getattr(self, name)!r} by the shape of its factors and cannot be "
                f"set to {value!r}; put another layer in its place"
            )

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Modules that an earlier version pickled have the number of slices as ``groups``."""
        super().__setstate__({("slices" if name == "groups" else name): value for name, value in state.items()})

    @property
    def decomposition(self) -> Decomposition:
        """Its (scheme, groups, rank) and pivots."""
        return Decomposition(self.scheme, self.slices, self.rank, self.pivots)

    def plain_factors(self) -> tuple[Tensor, Tensor]:
        """Weights of an encoder and a decoder without pivots: its own, where there are any the identity filled in."""
        factors = self.encoder, self.decoder
        if not self.pivots:
            return factors
        return with_identity(*factors, self.order, self.weight_shape, self.decomposition.fold, self.pivots)

    def slice_factors(self) -> tuple[Tensor, Tensor]:
        """Without pivots, (conv_groups, slices, rows, rank) and (conv_groups, slices, rank, columns of a slice)."""
        encoder, decoder = self.plain_factors()
        return slice_factors(encoder.detach(), decoder.detach(), self.weight_shape, self.scheme, self.slices)

    def dense_weight(self) -> Tensor:
        """The dense weight that the factors stand for, of shape ``weight_shape.weight``, in their dtype."""
        encoder, decoder = self.plain_factors()
        dense = weights_to_dense(encoder.double(), decoder.double(), self.weight_shape, self.scheme, self.slices)
        return dense.to(self.encoder.dtype)

    @property
    def stored_shape(self) -> tuple[int, ...]:
        """Shape of the weight as the dense module has it."""
        return self.weight_shape.weight

    def as_stored(self, weight: Tensor) -> Tensor:
        """A weight with the filters first as the dense module has it, and the other way round."""
        return weight

    def dense_module(self) -> nn.Module:
        """The ``nn.Linear`` or ``nn.ConvNd`` that the layer stands for, on the meta device."""
        raise NotImplementedError

    def _two_op(self, x: Tensor) -> bool:
        """Whether two library calls are all that can come of it; they check their arguments themselves."""
        if isinstance(x, Proxy):
            raise ModelError(f"torch.fx cannot trace {type(self).__name__}; trace alds_fast.to_plain(model) instead")
        return self.backend == "two-op" or (self.backend == "auto" and not x.is_cuda)

    def __prepare_scriptable__(self) -> NoReturn:
        """What torch.jit.script asks a module for before it compiles anything."""
        raise ModelError(
            f"torch.jit.script cannot compile {type(self).__name__}; script alds_fast.to_plain(model) instead"
        )

    def _why_pivots_are_not_fused(self) -> str | None:
        if not self.pivots:
            return None
        return "kernels take plain factors, or output pivots of a Linear; deploy fills the identity in"

    def _check_pivoted(self, x: Tensor) -> None:
        """What library calls alone cannot do is refused."""
        self._two_op(x)  # refuses proxies
        if self.backend == "fused":
            reason = self._why_pivots_are_not_fused()
            raise BackendError(f"backend='fused' cannot run {self}: {reason}; use 'two-op' or 'auto'")

    def why_not_fused(self, x: Tensor) -> str | None:
        """Why no fused kernel can run this layer on ``x``; None if one can."""
        raise NotImplementedError

    def to_dense(self) -> nn.Module:
        """The ``nn.Linear`` or ``nn.ConvNd`` with the recomposed weight and a copy of the bias."""
        dense = self.dense_module()
        weight = self.as_stored(self.dense_weight().detach()).contiguous()
        dense.weight = nn.Parameter(weight, self.encoder.requires_grad)
        if self.bias is not None:
            dense.bias = nn.Parameter(self.bias.detach().clone(), self.bias.requires_grad)
        return dense.train(self.training)

    def set_factors(self, left: Tensor, right: Tensor, like: Tensor) -> None:
        """Take the slices' factors in the type, on the device and with the requires_grad of ``like``.

        ``left``: (conv_groups, groups, rows, rank); ``right``: (conv_groups, groups, rank, cols / groups).
        """
        encoder, decoder, order = self._stored(left, right, like.dtype)
        self.encoder = nn.Parameter(encoder.to(like), like.requires_grad)
        self.decoder = nn.Parameter(decoder.to(like), like.requires_grad)
        if order is not None:
            self.order, self.in_order = own_memory(order.to(like.device)), False

    @torch.no_grad()
    def update_factors(self, left: Tensor, right: Tensor) -> None:
        """Take other factors, as for :meth:`set_factors`, into the parameters that are there."""
        encoder, decoder, order = self._stored(left, right, self.encoder.dtype)
        self.encoder.copy_(encoder)
        self.decoder.copy_(decoder)
        if order is not None:
            self.order.copy_(order)
            self.in_order = False

    def _stored(self, left: Tensor, right: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor | None]:
        """Encoder, decoder and, with pivots, the order, of the factors' type, to be rounded to ``dtype``."""
        if not self.pivots:
            return *factors_to_weights(left, right, self.weight_shape, self.scheme, dtype), None
        shapes = self.decomposition.factor_shapes(self.weight_shape)
        left, right, order = pivot_factors(left.double(), right.double(), self.weight_shape, self.pivots)
        encoder = own_memory(right.reshape(shapes[0]).contiguous())
        if self.pivots == "output":
            return encoder, own_memory(left.reshape(shapes[1]).contiguous()), order
        return encoder, decoder_weight(left, self.weight_shape, self.scheme), order

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *args: Any) -> None:
        """As any module, but for the mark that checkpoint directories hold in the place of the dense weight."""
        if (mark := state_dict.get(f"{prefix}weight")) is not None and mark.numel() == 1:
            del state_dict[f"{prefix}weight"]
        self.in_order = self.in_order and f"{prefix}order" not in state_dict
        super()._load_from_state_dict(state_dict, prefix, *args)

    def _take_factors_of(self, module: nn.Module) -> None:
        """Best factors of the module's weight (Eckart-Young-Mirsky, slice by slice), and a copy of its bias."""
        weight, shape = module.weight, self.weight_shape
        assert isinstance(weight, Tensor)
        if weight.is_meta or not bool(torch.isfinite(weight).all()):
            raise WeightError(f"{module}: its weight has NaN, infinite or, on the meta device, no values")
        wide = self.as_stored(weight.detach()).to(torch.float64 if weight.dtype == torch.float64 else torch.float32)
        matrix = permute_weight(wide, shape, self.scheme).reshape(matrix_shape(shape, self.scheme))
        (factors,) = batched_rsvd([matrix], [self.slices], [self.rank], exact=True)
        left, right = (f.unflatten(0, (shape.conv_groups, self.slices)) for f in (factors.left, factors.right))
        self.set_factors(left, right, weight)
        bias = getattr(module, "bias", None)  # tables have none
        if isinstance(bias, Tensor):
            self.bias = nn.Parameter(bias.detach().clone(), bias.requires_grad)
        self.train(module.training)

    def _structure(self) -> str:
        text = f"{self.decomposition}{', in_order=True' * self.in_order}{', bias=False' * (self.bias is None)}"
        return text if self.backend == "auto" else f"{text}, backend={self.backend!r}"
