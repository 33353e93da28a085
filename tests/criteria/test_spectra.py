import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from alds_fast.criteria import layer_batches
from alds_fast.layers import find_layers
from alds_fast.linalg.folding import fold


@given(st.lists(st.tuples(st.integers(1, 50), st.booleans()), max_size=12))
def test_a_batch_holds_no_more_than_the_largest_problem(problems):
    batches = list(layer_batches.batches(problems, lambda p: p[0], lambda p: p[1]))
    assert [p for batch in batches for p in batch] == problems
    largest = max((size for size, _ in problems), default=0)
    for batch in batches:
        assert sum(size for size, _ in batch) <= largest and len({kind for _, kind in batch}) == 1


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_fold_room_folds_exactly_and_is_used_again(dtype):
    model = nn.Sequential(nn.Conv2d(4, 6, 3), nn.Conv2d(6, 4, (3, 2), groups=2)).to(dtype)
    layers, room = find_layers(model), layer_batches.FoldRoom()
    weights, places = {layer.module.weight.untyped_storage().data_ptr() for layer in layers}, set()
    for scheme in (0, 1, 2, 3):
        for layer, matrix in zip(layers, room.matrices([(layer, scheme) for layer in layers]), strict=True):
            assert matrix.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
            assert torch.equal(matrix, fold(layer.module.weight.detach(), layer.shape, scheme).to(matrix.dtype))
            places.add(matrix.untyped_storage().data_ptr())
    assert len(places - weights) == 1
    assert weights <= places or dtype == torch.float16  # a fold that is the weight itself is not copied


def test_as_many_as_there_are_threads():
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        assert layer_batches.for_threads([5, 7, 100]) == 14 and layer_batches.for_threads([]) == 0
        torch.set_num_threads(64)
        assert layer_batches.for_threads([5, 7, 100]) == 28 and layer_batches.for_threads([5, 7, 100], most=64) == 448
    finally:
        torch.set_num_threads(threads)
