"""What is looked at before a compressed model is given back."""

import pytest
import torch
from torch import nn

import alds_fast as alds
from alds_fast.errors import ModelError
from alds_fast.planning import result_check


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(24, 24), nn.ReLU(), nn.Linear(24, 24))


@pytest.fixture
def small():
    return alds.compress(net(), params=0.6)


def test_layers_that_were_not_replaced_are_named(small):
    params = sum(p.numel() for p in small.parameters())
    result_check.check_result(small, ["0", "2"], params)
    with pytest.raises(ModelError, match=f"has {params:,} parameters, its plan {params + 1:,}"):
        result_check.check_result(small, ["0", "2"], params + 1)
    small[2] = nn.Linear(24, 24)
    with pytest.raises(ModelError, match=r"layer '2' was not replaced: it is a Linear .*exclude=\['2'\]"):
        result_check.check_result(small, ["0", "2"], params)


def test_values_outside_the_type_are_named(small):
    small[0].encoder.data[0, 0] = torch.inf
    with pytest.raises(ModelError, match=r"layer '0': its encoder has values outside the range of torch.float32"):
        result_check.check_result(small, ["0"], 0)


class Shaped(nn.Module):
    """Gives another output once a layer is no Linear any more."""

    def __init__(self, spoil):
        super().__init__()
        self.layer, self.spoil = nn.Linear(24, 24), spoil

    def forward(self, x):
        y = self.layer(x)
        return y if type(self.layer) is nn.Linear else self.spoil(y)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda y: y[:, :3], r"outputs of shapes \[\(8, 3\)\], the dense one \[\(8, 24\)\]"),
        (lambda y: y / 0, "output 0 of the compressed model is not finite where the dense model's is"),
        (lambda y: y.no_such_thing, "the compressed model does not run .AttributeError"),
    ],
)
def test_what_does_not_run_as_the_dense_model_does_is_not_given_back(spoil, message):
    model, x = Shaped(spoil), torch.randn(8, 24)
    for options in ({"data": [x]}, {"example_inputs": x}):
        with pytest.raises(ModelError, match=message):
            alds.compress(model, params=0.6, **options)
    plan = alds.analyze(model).plan(params=0.6)
    with pytest.raises(ModelError, match=message):
        plan.apply(model, example_inputs=x)


def test_nan_in_the_dense_outputs_is_not_held_against_the_compressed_model():
    class Masked(nn.Sequential):
        def forward(self, x):
            return super().forward(x).masked_fill(x > 0, torch.nan)

    assert alds.compress(Masked(*net()), params=0.6, example_inputs=torch.randn(8, 24)) is not None


def test_batches_that_can_be_read_once_are_left_alone():
    batches = iter([torch.randn(32, 24) for _ in range(2)])
    assert result_check.first_batch(net(), batches) is None and len(list(batches)) == 2
    assert result_check.first_batch(net(), []) is None and result_check.first_batch(net(), None) is None
