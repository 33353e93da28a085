"""Tensors get memory of their own where theirs is a piece of a larger one, or not aligned."""

import numpy
import pytest
import torch

from alds_fast.linalg import own_memory
from alds_fast.linalg.own_memory import ALIGNMENT


def _misaligned(numel):
    room = numpy.zeros(4 * numel + 2 * ALIGNMENT, numpy.uint8)
    start = (8 - room.ctypes.data) % ALIGNMENT
    return torch.from_numpy(room[start : start + 4 * numel].view(numpy.float32))


PIECES = {
    "not aligned": _misaligned(24),
    "a piece": torch.arange(64.0)[16:32],
    "every second value": torch.arange(64.0)[::2],
    "channels last": torch.arange(96.0).view(2, 3, 4, 4).permute(0, 2, 3, 1)[1:].permute(0, 3, 1, 2),
}


@pytest.mark.parametrize("name", PIECES)
def test_pieces_are_copied(name):
    piece = PIECES[name]
    copy = own_memory(piece)
    assert torch.equal(copy, piece) and copy.data_ptr() != piece.data_ptr() and copy.data_ptr() % ALIGNMENT == 0
    assert copy.untyped_storage().nbytes() == copy.numel() * copy.element_size()


class _Other(torch.Tensor):
    pass


@pytest.mark.parametrize(
    "tensor",
    [
        torch.arange(8.0),
        torch.arange(6.0).view(2, 3).mT,
        torch.empty(3, device="meta"),
        torch.empty(0, 3),
        torch.eye(3).to_sparse(),
        torch.arange(8.0)[3:].as_subclass(_Other),
    ],
)
def test_what_owns_its_memory_or_has_none_is_kept(tensor):
    assert own_memory(tensor) is tensor
