"""Tensors that come out of files and other libraries, in memory of their own."""

from __future__ import annotations

import torch
from torch import Tensor

ALIGNMENT = 64  # bytes, as torch's allocator on the CPU gives


def own_memory(tensor: Tensor) -> Tensor:
    """The tensor, or a copy of it if its memory is a piece of a larger one or begins in the middle of a cache line.

    Libraries choose their kernels by the alignment of what they are given, and kernels differ in the last digits.
    A piece of a file that is mapped into memory changes when the file does. Tensors without values or storage, and
    those of classes of their own, are given back as they are.
    """
    if type(tensor) is not Tensor or tensor.layout != torch.strided or tensor.is_meta or not tensor.numel():
        return tensor
    whole = tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()
    return tensor if whole and tensor.data_ptr() % ALIGNMENT == 0 else tensor.clone()
