"""Copies of models: what they leave out of a graph, what cannot be copied, what would go on using the dense layers."""

import copy
import functools
import threading
import types
import weakref

import pytest
import torch
from torch import nn

import alds_fast as alds
from alds_fast.errors import BudgetError, ModelError
from alds_fast.layers import check_copyable, find_layers, replace_layers


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc, self.body = nn.Linear(32, 32), nn.Linear(32, 32)

    def forward(self, x):
        return self.body(self.fc(x))


def no_spectra(*args, **options):
    raise AssertionError("the analysis has begun")


def check_refused(model, words, monkeypatch):
    """Compressing the model is refused before the analysis begins, and applying a plan too."""
    plan = alds.analyze(Net()).plan(params=0.6)
    with pytest.raises(ModelError, match=words):
        plan.apply(model)
    monkeypatch.setattr("alds_fast.planning.compression.analyze", no_spectra)
    with pytest.raises(ModelError, match=words):
        alds.compress(model, params=0.6)


def test_tensors_in_a_graph_are_copied_outside_of_it():
    model, x = Net(), torch.randn(3, 32)
    model.last = model(x)
    model.kept = {"all": [model.fc(x), types.SimpleNamespace(one=model.last.relu())]}
    model.register_buffer("state", model.last.sum(0))
    small = alds.compress(model, params=0.6)
    for mine, copied in (
        (model.last, small.last),
        (model.kept["all"][0], small.kept["all"][0]),
        (model.kept["all"][1].one, small.kept["all"][1].one),
        (model.state, small.state),
    ):
        assert torch.equal(mine, copied) and copied.grad_fn is None and copied.data_ptr() != mine.data_ptr()
        assert mine.grad_fn is not None


def with_lock(model):
    model.trainer = types.SimpleNamespace(model=model, parts=[{"lock": threading.Lock()}])
    return r"for model\.trainer\.parts\[0\]\['lock'\], a lock"


def with_file(model):
    model.body.log = open(__file__)  # noqa: SIM115
    return r"for model\.body\.log, a TextIOWrapper"


def with_generator(model):
    model.steps = (step for step in range(3))
    return r"for model\.steps, a generator"


class Uncopied:
    def __init__(self):
        self.inner = threading.Lock()

    def __deepcopy__(self, memo):
        raise NotImplementedError("not me\nand much more")


def with_uncopied(model):
    model.client = Uncopied()
    return r"\(not me\), for model\.client, a Uncopied"


@pytest.mark.parametrize("add", [with_lock, with_file, with_generator, with_uncopied])
def test_what_cannot_be_copied_is_named_before_the_work(add, monkeypatch):
    model = Net()
    model.body = nn.Sequential(model.body)  # the layer itself would be replaced, with all that hangs on it
    words = add(model)
    with pytest.raises(ModelError, match="cannot be deep-copied.*" + words + ".*take it off the model"):
        check_copyable(model)
    monkeypatch.setattr("alds_fast.planning.compression.analyze", no_spectra)
    with pytest.raises(ModelError, match=words):
        alds.compress(model, params=0.6)


def test_no_weight_is_copied_to_learn_whether_a_model_can_be():
    model = Net()
    model.register_buffer("large", torch.zeros(10))
    seen = []

    class Watched(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            if isinstance(result, torch.Tensor) and not result.is_meta and func is not torch.ops.aten.detach.default:
                seen.append(func)
            return result

    with Watched():
        check_copyable(model)
    assert seen == []
    assert [layer.reason for layer in find_layers(model)] == [None, None]


class Rebuilt(Net):
    def __deepcopy__(self, memo):
        other = type(self)()
        other.load_state_dict(self.state_dict())
        return other


class Same(Net):
    def __deepcopy__(self, memo):
        return self


class Reduced(Net):
    def __reduce__(self):
        return (Net, ())


class Polite(Net):
    def __deepcopy__(self, memo):
        other = type(self)()
        other._modules = copy.deepcopy(self._modules, memo)
        return other


@pytest.mark.parametrize(
    ("cls", "method"), [(Rebuilt, "__deepcopy__"), (Same, "__deepcopy__"), (Reduced, "__reduce__")]
)
def test_a_class_whose_copies_drop_new_layers_is_named_before_the_work(cls, method, monkeypatch):
    check_refused(cls(), f"the model itself: {cls.__name__} has a {method} of its own", monkeypatch)
    outer = nn.Sequential(nn.ReLU(), cls())
    with pytest.raises(ModelError, match=f"'1': {cls.__name__} has a {method} of its own.*layer '1.fc'"):
        replace_layers(outer, {"1.fc": nn.Linear(32, 32)})


def test_a_class_whose_copies_take_new_layers_over_is_compressed():
    small = alds.compress(Polite(), params=0.6)
    assert isinstance(small.fc, alds.LowRankLinear)


def by_closure(model, layer):
    return lambda x: layer(x)


def by_nested_closure(model, layer):
    @functools.wraps(layer.forward)
    def decorated(x):
        return held["layers"][0](x)

    held = {"layers": [layer]}
    return decorated


def by_default(model, layer):
    return lambda x, *, layer=layer: layer(x)


def by_weight(model, layer):
    weight = layer.weight
    return lambda x: x @ weight.T


def by_bound_method(model, layer):
    return layer.forward


def by_partial(model, layer):
    return functools.partial(layer.forward)


def by_weak_reference(model, layer):
    return weakref.ref(layer)


HOLDERS = [by_closure, by_nested_closure, by_default, by_weight, by_bound_method, by_partial, by_weak_reference]


@pytest.mark.parametrize("hold", HOLDERS)
def test_a_layer_that_is_held_past_the_model_is_left_out(hold):
    model = Net()
    model.act = hold(model, model.fc)
    reasons = {layer.name: layer.reason for layer in find_layers(model)}
    assert reasons["body"] is None and "model.act" in reasons["fc"] and "holds it in a function" in reasons["fc"]
    small = alds.compress(model, params=0.8)
    assert type(small.fc) is nn.Linear and isinstance(small.body, alds.LowRankLinear)
    alone = nn.Sequential(nn.Linear(32, 32))
    alone.act = hold(alone, alone[0])
    with pytest.raises(BudgetError, match=r"no layer can be decomposed: '0': model\.act"):
        alds.compress(alone, params=0.5)


@pytest.mark.parametrize("hold", HOLDERS[:3])
def test_a_hook_of_another_module_may_hold_a_layer(hold):
    model = Net()
    held = hold(model, model.fc)
    model.body.register_forward_pre_hook(lambda module, args: held(args[0]) and None)
    assert "_forward_pre_hooks" in next(layer.reason for layer in find_layers(model) if layer.name == "fc")


def test_a_partial_of_a_layer_is_copied_along():
    model, x = Net(), torch.randn(3, 32)
    model.act = functools.partial(model.fc)
    small = alds.compress(model, params=0.6)
    assert isinstance(small.fc, alds.LowRankLinear) and torch.equal(small.act(x), small.fc(x))


def test_methods_of_the_model_itself_are_copied_along(recwarn):
    model, x = Net(), torch.randn(3, 32)
    model.run = model.forward
    small = alds.compress(model, params=0.6)
    assert isinstance(small.fc, alds.LowRankLinear) and torch.equal(small.run(x), small(x))
    assert not [w for w in recwarn if "dense layers" in str(w.message)]


def test_an_instance_forward_that_is_the_class_own_is_none():
    model = Net()
    model.fc.forward = model.fc.forward  # as accelerate leaves it
    assert isinstance(alds.compress(model, params=0.6).fc, alds.LowRankLinear)


def test_a_function_that_holds_the_whole_model_is_warned_of():
    model = Net()
    model.act = lambda x: model.fc(x)
    with pytest.warns(UserWarning, match=r"model\.act: this function holds 'the model'.*set it anew"):
        small = alds.compress(model, params=0.6)
    assert isinstance(small.fc, alds.LowRankLinear)


def test_an_optimizer_of_dense_weights_is_warned_of():
    model = Net()
    model.trainer = types.SimpleNamespace(optimizers=[torch.optim.SGD(model.parameters(), 0.1)])
    with pytest.warns(
        UserWarning, match=r"model\.trainer\.optimizers\[0\]: this optimizer trains weights of the dense"
    ):
        alds.compress(model, params=0.6)


def test_an_optimizer_of_other_weights_is_not(recwarn):
    model = Net()
    model.scale = nn.Parameter(torch.ones(()))
    model.optimizer = torch.optim.SGD([model.scale], 0.1)
    small = alds.compress(model, params=0.6)
    assert small.optimizer.param_groups[0]["params"][0] is small.scale
    assert not [w for w in recwarn if "optimizer" in str(w.message)]
