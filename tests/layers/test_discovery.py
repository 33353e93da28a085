import pathlib

import pytest
import torch
from support.models import count, images, small_net
from torch import nn

import alds_fast as alds
from alds_fast.errors import LayerNotFoundError, ModelError
from alds_fast.layers import find_layers


def _reasons(model, **options):
    return {layer.name: layer.reason for layer in find_layers(model, **options)}


class _Mine(nn.Linear):
    def forward(self, x):
        return super().forward(x).relu()


def _odd_model():
    model = nn.ModuleDict(
        {
            "plain": nn.Linear(8, 8),
            "embedding": nn.Embedding(10, 8),
            "recurrent": nn.RNN(4, 4),
            "attention": nn.MultiheadAttention(8, 2),
            "mine": _Mine(8, 8),
            "normed": nn.utils.parametrizations.weight_norm(nn.Linear(8, 8)),
            "hooked": nn.Linear(8, 8),
            "lazy": nn.LazyLinear(4),
            "complex": nn.Linear(4, 4, dtype=torch.complex64),
            "empty": nn.Linear(0, 4),
            "float8": nn.Linear(8, 8).to(torch.float8_e4m3fn),
            "norm": nn.BatchNorm2d(4),
        }
    )
    model["hooked"].register_forward_hook(lambda *a: None)
    return model


def test_every_layer_left_out_has_a_reason_in_words():
    reasons = _reasons(_odd_model())
    assert reasons.pop("plain") is None and reasons.pop("embedding") is None
    for name, words in {
        "recurrent": "RNN is not decomposed",
        "attention": "MultiheadAttention is not decomposed, its in_proj_weight stays",
        "attention.out_proj": "nn.MultiheadAttention reads this weight directly",
        "mine": "subclass with a forward of its own",
        "normed": "parametrized",
        "hooked": "hooks",
        "lazy": "not initialised",
        "empty": "its weight is empty",
        "float8": "not real floating point",
        "complex": "not real floating point",
    }.items():
        assert words in reasons.pop(name), name
    assert reasons == {}  # a BatchNorm has no matrix and is not listed


def test_odd_model_is_compressed_around():
    model = _odd_model()
    small = alds.analyze(model).plan(error=0.9).apply(model)
    assert isinstance(small["plain"], alds.LowRankLinear)
    assert type(small["hooked"]) is nn.Linear and len(small["hooked"]._forward_hooks) == 1


class _Tied(nn.Module):
    def __init__(self, share):
        super().__init__()
        self.embedding, self.body, self.head = nn.Embedding(40, 16), nn.Linear(16, 16), nn.Linear(16, 40, bias=False)
        self.head.weight = self.embedding.weight if share == "parameter" else nn.Parameter(self.embedding.weight.data)

    def forward(self, x):
        return self.head(self.body(self.embedding(x)))


@pytest.mark.parametrize("share", ["parameter", "memory"])
def test_tied_weights_stay_tied(share):
    model = _Tied(share)
    assert _reasons(model)["head"] == "its weight is shared with 'embedding.weight' and stays tied"
    small = alds.compress(model, error=0.8)
    assert isinstance(small.body, alds.LowRankLinear)
    assert small.head.weight.data_ptr() == small.embedding.weight.data_ptr() != model.head.weight.data_ptr()
    assert small.alds_plan.params == count(small)


def test_several_views_of_one_large_weight_stay_tied():
    model = nn.Module()
    model.big = nn.Parameter(torch.randn(96, 32))
    for i, name in enumerate("qkv"):
        layer = nn.Linear(32, 32)
        layer.weight = nn.Parameter(model.big.data[32 * i : 32 * i + 32])
        setattr(model, name, layer)
    assert all("shared with 'big'" in _reasons(model)[name] for name in "qkv")
    small = alds.compress(model, error=0.8)
    for i, name in enumerate("qkv"):
        assert getattr(small, name).weight.data_ptr() == small.big[32 * i :].data_ptr()


def test_a_buffer_that_shares_a_weight_keeps_it_tied():
    model = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16))
    model.register_buffer("held", model[0].weight.detach())
    assert "shared with 'held'" in _reasons(model)["0"]
    small = alds.compress(model, params=0.8)
    assert small.held.data_ptr() == small[0].weight.data_ptr() != model.held.data_ptr()


@pytest.mark.parametrize(
    "extra", ["module", "parameter", "buffer", "forward", "full_backward_pre_hook", "state_dict_hook"]
)
def test_layers_with_something_of_their_own_are_left_alone(extra):
    model = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16))
    {
        "module": lambda m: setattr(m, "adapter", nn.Linear(16, 16)),
        "parameter": lambda m: m.register_parameter("extra", nn.Parameter(torch.zeros(3))),
        "buffer": lambda m: m.register_buffer("mask", torch.zeros(3)),
        "forward": lambda m: setattr(m, "forward", lambda x: x),
        "full_backward_pre_hook": lambda m: m.register_full_backward_pre_hook(lambda *a: None),
        "state_dict_hook": lambda m: m._register_state_dict_hook(lambda *a: None),
    }[extra](model[0])
    small = alds.compress(model, error=0.9)
    assert type(small[0]) is nn.Linear and isinstance(small[1], alds.LowRankLinear)
    assert small.alds_plan.params == count(small)


def test_two_linears_with_one_weight_stay_tied():
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8))
    model[1].weight = model[0].weight
    reasons = _reasons(model)
    assert "shared with '1.weight'" in reasons["0"] and "shared" in reasons["1"] and reasons["2"] is None


def test_a_module_used_twice_is_handled_once_and_stays_one():
    shared = nn.Linear(16, 16)
    model = nn.Sequential(shared, nn.ReLU(), shared, nn.Linear(16, 16))
    analysis = alds.analyze(model)
    assert [layer.name for layer in analysis.layers] == ["0", "3"]
    small = analysis.plan(params=0.5).apply(model)
    assert small[0] is small[2] and isinstance(small[0], alds.LowRankLinear)
    assert small.alds_plan.params == count(small) <= 0.5 * analysis.params


def test_a_shared_bias_stays_shared():
    model = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16))
    model[1].bias = model[0].bias
    small = alds.compress(model, params=0.6)
    assert small[0].bias is small[1].bias is not model[0].bias


def test_include_and_exclude_take_name_patterns():
    model = small_net()
    assert {n for n, r in _reasons(model, include="8").items() if r is None} == {"8"}
    assert {n for n, r in _reasons(model, exclude=["0", "[35]"]).items() if r is None} == {"8"}
    assert _reasons(model, include="8")["0"] == "not matched by include="
    assert _reasons(model, exclude="0")["0"] == "matched by exclude="
    small = alds.compress(model, error=0.5, include=["3"])
    assert sum(isinstance(m, alds.LowRankConv2d) for m in small.modules()) == 1
    assert small(images()).shape == (4, 10)


@pytest.mark.parametrize("argument", ["include", "exclude"])
def test_a_pattern_without_a_match_is_refused(argument):
    with pytest.raises(LayerNotFoundError, match=rf"{argument}='layers\.9' matches no layer"):
        alds.analyze(small_net(), **{argument: "layers.9"})


def test_the_model_itself_is_no_example_of_a_name():
    model = small_net()
    model.scale = nn.Parameter(torch.ones(2, 2))  # which makes the model a layer that is left out, named ""
    with pytest.raises(LayerNotFoundError, match=r"layers are, for example, \['0', '3', '5'\]"):
        alds.analyze(model, exclude="zzz")


def test_something_that_is_not_a_module():
    for thing in (None, {"weight": torch.zeros(2, 2)}, nn.Linear):
        with pytest.raises(ModelError, match=r"pass the torch\.nn\.Module itself"):
            alds.analyze(thing)


@pytest.mark.parametrize("path", ["some/checkpoint", pathlib.Path("checkpoint")])
def test_a_path_in_the_place_of_a_model_names_the_function_for_directories(path):
    for function in (alds.analyze, lambda model: alds.compress(model, params=0.5)):
        with pytest.raises(ModelError, match=r"is a text; .* compress_checkpoint\(source, output\)"):
            function(path)


class _Hiding(nn.Module):
    def __init__(self, hold):
        super().__init__()
        self.first, self.norms = nn.Linear(8, 8), [nn.LayerNorm(8)]
        self.hidden = hold([nn.Linear(8, 8), nn.Linear(8, 8)])
        self.order = [self.first, self.norms]  # an own part, once more


@pytest.mark.parametrize(
    ("hold", "where"),
    [
        (list, r"inner\.hidden\[0\], inner\.hidden\[1\]"),
        (lambda layers: {"a": tuple(layers[:1])}, r"inner\.hidden\['a'\]\[0\]"),
        (lambda layers: [nn.Sequential(*layers)], r"inner\.hidden\[0\]"),
    ],
)
def test_layers_in_plain_lists_are_warned_of_once(hold, where):
    model = nn.ModuleDict({"inner": _Hiding(hold)})
    with pytest.warns(UserWarning, match=rf"stay as they are: {where}; hold them in nn\.ModuleList") as caught:
        assert [layer.name for layer in alds.analyze(model).layers] == ["inner.first"]
    assert len(caught) == 1 and caught[0].filename == __file__


@pytest.mark.filterwarnings("error")
def test_registered_layers_are_not_warned_of():
    assert len(alds.analyze(_Hiding(nn.ModuleList)).layers) == 3
