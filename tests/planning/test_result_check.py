"""What is looked at before a compressed model is given back."""

import secrets
import warnings

import pytest
import torch
from support.models import count
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
    params = count(small)
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


class Asks(nn.Module):
    """Does something else once a layer is no Linear any more."""

    def __init__(self, spoil):
        super().__init__()
        self.layer, self.spoil, self.last = nn.Linear(24, 24), spoil, nn.Linear(24, 24)

    def forward(self, x):
        y = self.last(self.layer(x))
        return y if type(self.layer) is nn.Linear else self.spoil(y)


class AsksBetween(Asks):
    def forward(self, x):
        y = self.layer(x)
        return self.last(y if isinstance(self.layer, nn.Linear) else self.spoil(y))


class Holds(nn.Module):
    """Calls a layer that it holds in a plain list too."""

    def __init__(self):
        super().__init__()
        self.layer, self.last = nn.Linear(24, 24), nn.Linear(24, 24)
        HELD[:] = [self.layer]

    def forward(self, x):
        return self.last(HELD[0](x))


HELD = []


def check_refusal(model, x, message):
    for options in ({"data": [x]}, {"example_inputs": x}, {"data": [x], "refit": True}):
        with pytest.raises(ModelError, match=message):
            alds.compress(model, params=0.6, **options)
    plan = alds.analyze(model).plan(params=0.6)
    with pytest.raises(ModelError, match=message):
        plan.apply(model, example_inputs=x)


@pytest.mark.parametrize(
    ("kind", "spoil", "message"),
    [
        (Asks, lambda y: y[:, :3], "does something else than the dense one before its output, even where"),
        (Asks, torch.relu, "does something else than the dense one before its output, even where"),
        (Asks, lambda y: y / 0, "does something else than the dense one before its output"),
        (AsksBetween, torch.relu, "something else than the dense one before its call of layer 'last'"),
        (Asks, lambda y: y.no_such_thing, "the compressed model does not run .AttributeError"),
    ],
)
def test_what_asks_for_the_type_of_a_layer_is_not_given_back(kind, spoil, message):
    check_refusal(kind(spoil), torch.randn(32, 24), message)


def test_what_calls_dense_layers_past_the_model_is_not_given_back():
    message = r"layer 'layer' is called in the dense model and not in its copy.*exclude=\['layer'\]"
    check_refusal(Holds(), torch.randn(32, 24), message)


def test_models_that_no_run_repeats_and_outputs_of_other_shapes_pass():
    class Unlike(nn.Sequential):
        def forward(self, x):
            return super().forward(x) + secrets.randbelow(1000)

    class Selects(nn.Sequential):
        def forward(self, x):
            y = super().forward(x)
            return y[y > 0]  # as many as there are, as boxes of a detector

    for kind in (Unlike, Selects):
        small = alds.compress(kind(*net()), params=0.6, example_inputs=torch.randn(32, 24))
        assert all(row.rank for row in small.alds_plan.layers)


def test_outputs_that_overflow_between_the_factors_are_not_given_back():
    class Grows(nn.Sequential):
        def forward(self, x):
            y = super().forward(x)
            return y / (y.norm() / self.limit - 1).clamp(min=0)  # finite only as long as y is above the limit

    model, x = Grows(*net()).eval(), torch.randn(32, 24)
    model.limit = float(nn.Sequential.forward(model, x).norm()) * 0.999
    with pytest.raises(ModelError, match="output 0 of the compressed model is not finite where the dense model's is"):
        alds.compress(model, params=0.3, example_inputs=x)


def test_nan_in_the_dense_outputs_is_not_held_against_the_compressed_model():
    class Masked(nn.Sequential):
        def forward(self, x):
            return super().forward(x).masked_fill(x > 0, torch.nan)

    assert alds.compress(Masked(*net()), params=0.6, example_inputs=torch.randn(8, 24)) is not None


@pytest.mark.parametrize("precision", ["float32", "float64"])
def test_weights_that_have_changed_since_they_were_analysed_are_warned_of(precision):
    model = nn.Sequential(nn.Linear(64, 64), nn.ConvTranspose1d(64, 32, 3), nn.Linear(64, 64))
    model = alds.compress(model, params=0.9, include="2")
    plan = alds.analyze(model, precision=precision).plan(params=0.5)
    assert all(row.choice for row in plan.layers)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plan.apply(model)
    with torch.no_grad():
        model[0].weight *= 1.001
    with pytest.warns(UserWarning, match="layer '0': the weight has changed since it was analysed"):
        plan.apply(model)
    with torch.no_grad():
        model[1].weight[0, 0, 0] += 1
    with pytest.warns(UserWarning, match="layer '0' and 1 more: .* analyze.model. and plan again"):
        plan.apply(model)
