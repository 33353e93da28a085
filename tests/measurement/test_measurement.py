"""Recording what layers are called with, and the structure of the timing. No timing decides a test."""

import copy
import json

import pytest
import torch
from support.models import images, small_net
from torch import nn
from torch.utils.data import DataLoader

from alds_fast.errors import AldsError, ArgumentError, LayerNotFoundError, ModelError
from alds_fast.measurement import (
    InputSpec,
    call_model,
    first_batch,
    inference,
    interleaved_ms,
    layer_inputs,
    median_ratio,
)
from alds_fast.measurement.timing import timer


class Twice(nn.Module):
    """Calls one layer twice with different inputs, one never, and takes keywords."""

    def __init__(self):
        super().__init__()
        self.used, self.unused = nn.Linear(8, 8), nn.Linear(8, 8)
        self.norm = nn.BatchNorm1d(8)

    def forward(self, x, scale=1.0):
        return self.used(input=self.used(self.norm(x)) * scale) + self.used(x[:1])


def test_inputs_are_counted_by_description():
    inputs = layer_inputs(Twice(), torch.ones(4, 8), ["used", "unused"])
    spec = InputSpec((4, 8), torch.float32, "cpu", False)
    assert inputs == {"used": {spec: 2, InputSpec((1, 8), torch.float32, "cpu", False): 1}, "unused": {}}


@pytest.mark.parametrize("inputs", [(torch.ones(4, 8), 2.0), [torch.ones(4, 8)], {"x": torch.ones(4, 8), "scale": 3.0}])
def test_positional_and_keyword_arguments(inputs):
    assert sum(layer_inputs(Twice(), inputs, ["used"])["used"].values()) == 3


def test_the_model_is_left_as_it_was():
    model = Twice().train()
    model.used.eval()
    before = copy.deepcopy(model.state_dict())
    for inputs, error in ((torch.randn(4, 8), None), (torch.randn(4, 7), ModelError)):
        if error:
            with pytest.raises(error, match="example_inputs did not run.*7") as caught:
                layer_inputs(model, inputs, ["used"])
            assert caught.value.__cause__ is not None and isinstance(caught.value, AldsError)
        else:
            layer_inputs(model, inputs, ["used"])
        assert [m.training for m in model.modules()] == [True, False, True, True]
        assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
        assert not model.used._forward_pre_hooks and not model.used._forward_pre_hooks_with_kwargs
        assert torch.is_grad_enabled()


def test_batch_norm_runs_in_evaluation_mode_without_gradients():
    seen = []

    class Probe(nn.Module):
        def forward(self, x):
            seen.append((self.training, torch.is_grad_enabled()))
            return x

    layer_inputs(Probe().train(), torch.ones(1), [])
    assert seen == [(False, False)]


def test_memory_format_is_recorded_and_made():
    model, x = small_net(), images()
    plain = next(iter(layer_inputs(model, x, ["0"])["0"]))
    last = next(iter(layer_inputs(model, x.contiguous(memory_format=torch.channels_last), ["0"])["0"]))
    assert not plain.channels_last and last.channels_last
    made = last.make()
    assert made.is_contiguous(memory_format=torch.channels_last) and made.shape == x.shape
    assert torch.equal(made, last.make()) and not torch.equal(made, last.make(seed=1))
    assert torch.equal(made, plain.make())
    video = InputSpec((1, 2, 3, 4, 5), torch.float64, "cpu", True).make()
    assert video.is_contiguous(memory_format=torch.channels_last_3d) and InputSpec.of(video).channels_last
    assert InputSpec((3,), torch.int64, "cpu", False).make().dtype == torch.int64
    assert InputSpec.of(torch.ones(2, 3, 4, 4).transpose(2, 3)).channels_last is False


def test_descriptions_survive_json():
    spec = InputSpec((2, 3, 4, 4), torch.bfloat16, "cuda:1", True)
    assert InputSpec.from_dict(json.loads(json.dumps(spec.to_dict()))) == spec
    for fields in ({}, 3, {**spec.to_dict(), "dtype": "nn"}, {**spec.to_dict(), "shape": [-1]}):
        with pytest.raises(ArgumentError, match="not the description of an input"):
            InputSpec.from_dict(fields)


@pytest.mark.parametrize("inputs", [None, 3, "x", {1: torch.ones(1)}, {torch.ones(1)}])
def test_other_inputs_are_refused(inputs):
    with pytest.raises(ArgumentError, match="expected a tensor, a tuple or list"):
        layer_inputs(nn.Identity(), inputs, [])


def test_unknown_layers_and_models_are_refused():
    with pytest.raises(LayerNotFoundError, match="'nope' is not in the model"):
        layer_inputs(small_net(), images(), ["nope"])
    with pytest.raises(ModelError, match="model is a int"):
        layer_inputs(3, images(), [])


def test_a_shared_module_is_found_under_both_names():
    shared = nn.Linear(4, 4)
    inputs = layer_inputs(nn.Sequential(shared, shared), torch.ones(2, 4), ["0", "1"])
    assert [sum(inputs[n].values()) for n in ("0", "1")] == [2, 2]


def test_torchs_transformer_layers_show_their_linears():
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    assert sum(layer_inputs(layer, torch.randn(2, 5, 16), ["linear1"])["linear1"].values()) == 1


def test_inference_does_not_call_train_methods():
    class Merging(nn.Linear):
        def train(self, mode=True):
            raise AssertionError("a model may merge weights here")

    model = Merging(2, 2)
    with inference(model):
        assert not model.training and not call_model(model, torch.ones(1, 2)).requires_grad
    assert model.training


# ------------------------------------------------------------------------------------------------- timing


def test_sides_take_turns_and_the_order_alternates(monkeypatch):
    order = []
    monkeypatch.setattr(timer, "_cpu_ms", lambda call, count: (order.append((call(), count)), 0.5)[1])
    times = interleaved_ms({"a": lambda: "a", "b": lambda: "b"}, "cpu", rounds=3, min_ms=2.0)
    assert times == {"a": [0.5] * 3, "b": [0.5] * 3}
    assert order[6:] == [("a", 4), ("b", 4), ("b", 4), ("a", 4), ("a", 4), ("b", 4)]


def test_calls_run_often_enough_and_without_gradients():
    seen = []
    times = interleaved_ms({"x": lambda: seen.append(torch.is_grad_enabled())}, torch.device("cpu"), rounds=2)
    assert len(times["x"]) == 2 and min(times["x"]) > 0 and len(seen) > 10 and not any(seen)


def test_bad_timing_arguments():
    for options in ({"rounds": 0}, {"min_ms": 0.0}):
        with pytest.raises(ArgumentError, match="expected at least 1"):
            interleaved_ms({}, "cpu", **options)


def test_ratios_are_medians_of_ratios():
    assert median_ratio({"a": [1, 10, 4], "b": [2, 5, 4]}, "a", "b") == 1.0


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_graphs_and_the_eager_way_out():
    x = torch.randn(256, 256, device="cuda")
    graphed = interleaved_ms({"a": lambda: x @ x, "b": lambda: x + x}, "cuda", rounds=3)
    eager = interleaved_ms({"a": lambda: x @ x, "b": lambda: x.sum().item()}, "cuda", rounds=3)
    assert all(len(v) == 3 and min(v) > 0 for times in (graphed, eager) for v in times.values())


def test_the_first_batch_is_looked_at_and_comes_again():
    net, batches = nn.Linear(4, 4), [torch.randn(2, 4) for _ in range(3)]
    first, data = first_batch(net, iter(batches))
    assert first is batches[0] and [x is y for x, y in zip(data, batches, strict=True)] == [True] * 3
    assert first_batch(net, batches) == (batches[0], batches) and first_batch(net, None) == (None, None)
    first, data = first_batch(net, iter([]))
    assert first is None and list(data) == []
    loader = DataLoader(batches, shuffle=True)
    torch.manual_seed(0)
    expected = list(loader)
    torch.manual_seed(0)
    first_batch(net, loader)
    assert all(torch.equal(x, y) for x, y in zip(loader, expected, strict=True))
