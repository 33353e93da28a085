"""What stands in the place of ``weight`` on a layer that has no dense weight."""

from __future__ import annotations

from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

_INITIALIZED = "_is_hf_initialized"  # transformers' functions that initialise weights pass marked ones by
_REFUSED = (
    *("__getitem__", "__setitem__", "__len__", "__iter__", "__hash__", "__float__", "__neg__", "__invert__"),
    *("__add__", "__radd__", "__iadd__", "__sub__", "__rsub__", "__isub__", "__mul__", "__rmul__", "__imul__"),
    *("__truediv__", "__rtruediv__", "__itruediv__", "__matmul__", "__rmatmul__", "__pow__", "__abs__"),
)


class AbsentWeight:
    """What a low-rank layer has in the place of ``weight``: its shape, type and device, which much code asks for.

    ``requires_grad`` is that of the factors: true if one of them is trained. Setting it, or ``requires_grad_``,
    freezes or trains both. Whatever needs the values of a weight, or sets anything else, raises AttributeError.
    """

    requires_grad: bool
    _is_hf_initialized = True

    def __init__(self, owner: str, shape: tuple[int, ...], holder: nn.Module) -> None:
        """``holder``: the module whose parameters of two or more dimensions are the factors.

        Without any, these are int8, whose scales have the type and the device.
        """
        vars(self).update(_owner=owner, _holder=holder, shape=torch.Size(shape), ndim=len(shape))

    @property
    def _factors(self) -> list[Tensor]:
        factors: list[Tensor] = [p for p in self._holder.parameters() if p.dim() >= 2]
        factors = factors or [b for b in self._holder.buffers() if b.is_floating_point()]
        return factors or self._refuse()

    @property
    def dtype(self) -> torch.dtype:
        """As of a tensor: the type of the factors."""
        return self._factors[0].dtype

    @property
    def device(self) -> torch.device:
        """As of a tensor: where the factors lie."""
        return self._factors[0].device

    @property
    def is_cuda(self) -> bool:
        """As of a tensor."""
        return self._factors[0].is_cuda

    def size(self, dim: int | None = None) -> Any:
        """As of a tensor."""
        return self.shape if dim is None else self.shape[dim]

    def dim(self) -> int:
        """As of a tensor."""
        return self.ndim

    def numel(self) -> int:
        """As of a tensor."""
        return self.shape.numel()

    def is_floating_point(self) -> bool:
        """As of a tensor."""
        return self.dtype.is_floating_point

    def requires_grad_(self, requires_grad: bool = True) -> AbsentWeight:
        """Train the factors, or freeze them."""
        for factor in self._factors:
            if requires_grad and factor.dim() < 2:
                raise AttributeError(f"the factors of {self._owner} are int8 and cannot be trained", obj=self)
            factor.requires_grad_(requires_grad)
        return self

    def stands_for(self, layer: nn.Module) -> bool:
        """Whether it is the weight of that layer."""
        return self._holder is layer

    def _refuse(self, *_: Any) -> NoReturn:
        raise AttributeError(
            f"{self._owner} has no dense weight; code that uses .weight needs the layer left out (exclude=) or the "
            f"low-rank layer's dense_weight()",
            obj=self,
        )

    def __getattr__(self, name: str) -> Any:
        if name == "requires_grad":
            return any(factor.requires_grad for factor in self._factors)
        if name.startswith("__") or name in ("_owner", "_holder"):
            raise AttributeError(name)
        return self._refuse()

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "requires_grad":
            self.requires_grad_(value)
        elif name != _INITIALIZED:
            raise AttributeError(
                f"{self._owner} has no dense weight, so .weight.{name} cannot be set; set that of .encoder and "
                f".decoder, or put layer.to_dense() in its place"
            )

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        absent = next(a for a in tree_leaves([args, kwargs]) if isinstance(a, AbsentWeight))
        return absent._refuse()


for _name in _REFUSED:  # Python looks these up on the class
    setattr(AbsentWeight, _name, AbsentWeight._refuse)
