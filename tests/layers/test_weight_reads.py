"""Layers whose weight a forward uses itself stay dense; asking for its type or shape is nothing."""

import functools

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

import alds_fast as alds
from alds_fast.errors import ModelError
from alds_fast.layers.obstacles import weight_reads

REASON = "computes with its weight instead of calling it"


class Direct(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(24, 24), nn.Linear(24, 24)

    def forward(self, x):
        return self.b(F.linear(x, self.a.weight, self.a.bias))


class ByName(Direct):
    def forward(self, x):
        layer = self.a
        return self.b(x @ layer.weight.T)


class InMethod(Direct):
    def forward(self, x):
        return self.b(self._mix(x))

    def _mix(self, x):
        return F.linear(x, weight=self.a.weight)


class Deep(nn.Module):
    def __init__(self):
        super().__init__()
        self.parts = nn.ModuleList(Asks() for _ in range(2))

    def forward(self, x):
        for part in self.parts:
            x = F.linear(x, part.a.weight)
        return self.parts[0].b(x)


class Asks(Direct):
    """Reads type, shape and device of the weight, and uses another's values in a method that forward does not call."""

    def forward(self, x):
        x = x.to(self.a.weight.dtype) if isinstance(self.a.weight, torch.Tensor) else x
        return self.b(self.a(x.view(-1, self.a.weight.shape[1]).to(self.a.weight.device)))

    def reset(self):
        self.a.weight.data.zero_()


@pytest.mark.parametrize("kind", [Direct, ByName, InMethod])
def test_forwards_that_use_a_weight(kind):
    net = kind()
    small = alds.compress(net, params=0.8, groups=(1,))
    reasons = {row.name: row.reason for row in small.alds_plan.layers}
    assert reasons == {"a": f"the forward of {kind.__name__} {REASON}", "b": None}
    assert small(torch.randn(3, 24)).isfinite().all()


def test_layers_of_a_list_and_of_modules_further_down():
    reasons = {layer.name: layer.reason for layer in alds.analyze(Deep()).layers}
    assert [n for n, reason in reasons.items() if reason] == ["parts.0.a", "parts.1.a"]


def test_asking_is_not_reading():
    assert all(layer.reason is None for layer in alds.analyze(Asks()).layers)


def walked(x, part):
    return walked(F.linear(x, part.b.weight), part.a) if hasattr(part, "a") else x


def scaled(layer, x):
    return F.linear(x, 2 * layer.weight)


class Recursive(Direct):
    """Functions that call themselves, one inside and one outside, and a method that calls a function of its name."""

    def forward(self, x):
        def doubled(x, times):
            return x if times == 0 else doubled(2 * x, times - 1)

        return walked(self.scaled(doubled(x, 3)), self)

    def scaled(self, x):
        return scaled(self.a, x)


def test_functions_that_call_themselves():
    assert [layer.reason for layer in alds.analyze(Recursive()).layers] == [f"the forward of Recursive {REASON}"] * 2


def made_at_run_time():
    space = {"nn": nn, "F": F}
    exec(
        "class Hidden(nn.Module):\n"
        "    def __init__(self):\n"
        "        super().__init__()\n"
        "        self.a, self.b = nn.Linear(24, 24), nn.Linear(24, 24)\n"
        "    def forward(self, x):\n"
        "        return self.b(F.linear(x, self.a.weight))\n",
        space,
    )
    return space["Hidden"]()


def test_where_there_is_no_source_a_run_tells():
    net, x = made_at_run_time(), torch.randn(8, 24)
    for options in ({"data": [x]}, {"example_inputs": x}, {"data": iter([x])}):
        small = alds.compress(net, params=0.8, groups=(1,), **options)
        reasons = {row.name: row.reason for row in small.alds_plan.layers}
        assert reasons == {"a": f"the forward of Hidden {REASON}", "b": None}
        assert small(x).isfinite().all()
    plan = alds.analyze(net).plan(params=0.6)
    with pytest.raises(ModelError, match=r"with the weight of layer 'a' instead of calling it.*exclude=\['a'\]"):
        plan.apply(net, example_inputs=x)


def through(layer, x):
    return torch.addmm(layer.bias, x, layer.weight.t())


def through_a_module(module, x):
    return through(x=x, layer=module.a)


def untouched(function):
    def call(*args):
        return function(*args)

    return call


class Taking(Direct):
    """``a`` is used by its weight, ``b`` called."""

    def forward(self, x):
        return self.b(self.use(x))


class InAHelper(Taking):
    def use(self, x):
        return through(self.a, x)


class ThroughItself(Taking):
    def use(self, x):
        return through_a_module(self, x=x)


class AProperty(Taking):
    @property
    def kernel(self):
        return self.a.weight

    def use(self, x):
        return F.linear(x, self.kernel)


class ACachedProperty(Taking):
    @functools.cached_property
    def kernel(self):
        return self.a.weight.detach().t().contiguous()

    def use(self, x):
        return x @ self.kernel


class InAnEnumeratedList(Taking):
    def __init__(self):
        super().__init__()
        self.some = nn.ModuleList([self.a])

    def use(self, x):
        for _, layer in enumerate(self.some):
            x = F.linear(x, layer.weight)
        return x


class InADict(Taking):
    def __init__(self):
        super().__init__()
        self.both = nn.ModuleDict({"a": self.a, "b": self.b})

    def use(self, x):
        return F.linear(x, self.both["a"].weight)


class InADictsValues(Taking):
    def __init__(self):
        super().__init__()
        self.some = nn.ModuleDict({"a": self.a})

    def use(self, x):
        return sum(F.linear(x, layer.weight) for layer in self.some.values())


class ByGetattr(Taking):
    def use(self, x):
        return F.linear(x, getattr(getattr(self, "a"), "weight"))  # noqa: B009


class ByParameters(Taking):
    def use(self, x):
        return F.linear(x, *self.a.parameters())


class ByStateDict(Taking):
    def use(self, x):
        return F.linear(x, self.a.state_dict()["weight"])


class ByForwardOfTorch(Taking):
    def use(self, x):
        return nn.Linear.forward(self.a, x)


class OfTheBase(InAHelper):
    def use(self, x):
        return super().use(x) + 1


class Checkpointed(InAHelper):
    def forward(self, x):
        return self.b(checkpoint(super().use, x, use_reentrant=False))


class Decorated(Taking):
    @untouched
    def use(self, x):
        return F.linear(x, self.a.weight)


class WithoutGradients(Taking):
    @torch.no_grad()
    def use(self, x):
        return F.linear(x, self.a.weight)


class InsideAFunction(Taking):
    def use(self, x):
        def apply(layer):
            return F.linear(x, layer.weight)

        return (lambda y: apply(self.a))(x)


class Returned(Taking):
    def layer(self):
        return self.a

    def use(self, x):
        return F.linear(x, self.layer().weight)


class OfAParent(nn.Module):
    def __init__(self):
        super().__init__()
        self.part = Taking()
        self.part.use = torch.relu

    def forward(self, x):
        return self.part(F.linear(x, self.part.a.weight))


class PassedOn(Taking):
    class Uses(nn.Module):
        def forward(self, x, layer):
            return F.linear(x, layer.weight)

    def __init__(self):
        super().__init__()
        self.user = self.Uses()

    def use(self, x):
        return self.user(x, self.a)


class InAPlainList(Taking):
    def __init__(self):
        super().__init__()
        self.weights = [self.a.weight]

    def use(self, x):
        return x @ self.weights[0]


class Parametrised(Taking):
    def use(self, x):
        return self.a.forward(x) * next(self.a.parameters()).dtype.itemsize


BY_SOURCE = [
    InAHelper, ThroughItself, AProperty, ACachedProperty, InAnEnumeratedList, InADict, InADictsValues, ByGetattr,
    ByParameters, ByStateDict, ByForwardOfTorch, OfTheBase, Checkpointed, Decorated, WithoutGradients, InsideAFunction,
    OfAParent,
]  # fmt: skip


@pytest.mark.parametrize("kind", BY_SOURCE)
def test_what_the_source_says(kind):
    reasons = {layer.name: layer.reason for layer in alds.analyze(kind(), groups=(1,)).layers}
    assert [name.split(".")[-1] for name, reason in reasons.items() if reason] in (["a"], ["a", "0"], ["a", "a"])


@pytest.mark.parametrize("kind", [*BY_SOURCE, Returned, PassedOn, InAPlainList])
def test_what_a_run_says(kind, monkeypatch):
    monkeypatch.setattr(weight_reads, "_source", lambda function: None)
    weight_reads._read_by.cache_clear()
    model, x = kind().eval(), torch.randn(3, 24)
    small = alds.compress(model, params=0.8, groups=(1,), example_inputs=x)
    weight_reads._read_by.cache_clear()
    assert [row.name.split(".")[-1] for row in small.alds_plan.layers if row.rank] == ["b"]
    assert small(x).shape == (3, 24)


@pytest.mark.parametrize("kind", [Asks, Parametrised, lambda: nn.TransformerEncoderLayer(24, 4, 96, batch_first=True)])
def test_calls_and_questions_are_not_reading(kind):
    small = alds.compress(kind().eval(), params=0.8, groups=(1,), align=8, example_inputs=torch.randn(3, 24))
    assert all(row.reason is None for row in small.alds_plan.layers if row.name in ("a", "b", "linear1", "linear2"))


def test_compiled_models_are_watched_as_they_were_written():
    net, x = made_at_run_time(), torch.randn(8, 24)
    analysis = alds.analyze(torch.compile(net, backend="eager"), example_inputs=x)
    assert [layer.name for layer in analysis.layers if layer.reason] == ["_orig_mod.a"]


def test_a_model_that_cannot_be_watched_says_so():
    class Refuses(Direct):
        def forward(self, x):
            if torch.overrides._get_current_function_mode_stack():
                raise TypeError("no modes")
            return self.b(self.a(x))

    with pytest.warns(UserWarning, match="could not be watched .TypeError: no modes."):
        assert all(layer.reason is None for layer in alds.analyze(Refuses(), example_inputs=torch.randn(2, 24)).layers)
    for options in ({"example_inputs": torch.randn(2, 5)}, {"data": [torch.randn(2, 5)]}):
        with pytest.raises(ModelError, match=r"(example_inputs|batch 1 of data=) did not run through the model"):
            alds.analyze(Direct(), **options)
