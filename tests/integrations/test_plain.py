"""The plain form of a compressed model: the same function, in modules that every tool knows."""

import copy
import pickle

import pytest
import torch
from support import checkpoints
from support.marks import slow
from support.models import count, images, small_net
from torch import nn
from torch.nn.utils import parametrize

import alds_fast as alds
from alds_fast.errors import ModelError
from alds_fast.layers import LowRankLayer, MergedLinears, MergedPart
from alds_fast.linalg import SCHEMES


class Mixed(nn.Module):
    """Convolutions of two padding modes, and linear layers that read three dimensions."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(nn.Conv2d(8, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 32, (3, 2), padding="same",
                                  padding_mode="reflect"))  # fmt: skip
        self.head = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 48))

    def forward(self, x):
        return self.head(self.body(x).flatten(2).transpose(1, 2))


X = torch.randn(2, 8, 6, 6, generator=torch.Generator().manual_seed(3))


def mixed(slices):
    return alds.compress(Mixed().eval(), params=0.4, groups=(slices,))


def shuffled(layer):
    """With pivots anywhere."""
    layer.order.copy_(torch.randperm(len(layer.order)))
    if layer.pivots == "input":  # every slice's channels stay its own
        slices = layer.groups_of_encoder
        cols = len(layer.order) // slices
        orders = torch.stack([torch.randperm(cols) + i * cols for i in range(slices)])
        layer.order.copy_(torch.cat([orders[:, : layer.rank].flatten(), orders[:, layer.rank :].flatten()]))
    return layer


def layers_with_pivots():
    yield shuffled(alds.LowRankLinear(12, 8, 3, pivots="output")), (5, 12)
    yield shuffled(alds.LowRankLinear(12, 8, 3, pivots="output", bias=False)), (2, 5, 12)
    yield shuffled(alds.LowRankLinear(12, 8, 2, groups=3, pivots="input")), (5, 12)
    options = {"padding": 1, "stride": 2, "conv_groups": 2}
    yield shuffled(alds.LowRankConv2d(4, 6, 3, 2, pivots="output", **options)), (2, 4, 9, 8)
    yield shuffled(alds.LowRankConv2d(8, 6, 3, 1, groups=2, scheme=3, pivots="input", **options)), (2, 8, 9, 8)
    yield shuffled(alds.LowRankConv1d(4, 6, 3, 2, pivots="output", padding="same")), (4, 9)
    yield shuffled(alds.LowRankConv3d(4, 6, 3, 2, scheme=3, pivots="input", padding=1)), (1, 4, 5, 6, 7)


@pytest.mark.parametrize(("layer", "shape"), [*layers_with_pivots()], ids=lambda v: repr(v)[:90])
def test_a_layer_with_pivots_computes_what_it_did(layer, shape):
    x, plain = torch.randn(shape), alds.to_plain(layer)
    torch.testing.assert_close(plain(x), layer(x))
    assert parameters(plain) == parameters(layer)
    for form in (torch.fx.symbolic_trace(plain), torch.jit.script(plain), torch.export.export(plain, (x,)).module()):
        torch.testing.assert_close(form(x), layer(x))


def parameters(model):
    return sum(p.numel() for p in model.parameters())


def layers_of_every_kind():
    for slices in (1, 3):
        yield alds.LowRankLinear(12, 6, 2, groups=slices), (5, 12)
        yield alds.LowRankLinear(12, 6, 2, groups=slices, bias=False), (2, 3, 4, 12)
        yield alds.LowRankLinear(12, 6, 2, groups=slices), (12,)
    for scheme in SCHEMES:
        for mode in ("zeros", "reflect", "replicate", "circular"):
            options = {"scheme": scheme, "padding_mode": mode}
            yield alds.LowRankConv1d(4, 6, 4, 2, groups=2, padding="same", **options), (2, 4, 9)
            yield alds.LowRankConv2d(4, 6, (3, 4), 1, groups=2, padding="same", dilation=(2, 1), **options), (4, 9, 8)
            yield alds.LowRankConv2d(4, 6, 3, 1, conv_groups=2, padding=(1, 2), stride=(2, 3), **options), (2, 4, 9, 8)
            yield alds.LowRankConv3d(4, 6, (2, 3, 3), 2, padding=(0, 1, 1), bias=False, **options), (2, 4, 5, 6, 7)
            yield alds.LowRankConv3d(4, 6, (3, 1, 2), 1, padding="valid", groups=4, **options), (2, 4, 5, 6, 7)


@pytest.mark.filterwarnings("ignore:Using padding='same'")
@pytest.mark.parametrize(("layer", "shape"), [*layers_of_every_kind()], ids=lambda v: repr(v)[:90])
def test_a_layer_computes_what_it_did(layer, shape):
    x, plain = torch.randn(shape), alds.to_plain(layer)
    if isinstance(layer, alds.LowRankLinear) and layer.slices > 1:
        torch.testing.assert_close(plain(x), layer(x))
    else:
        assert torch.equal(plain(x), layer(x))  # the same kernels run
    assert count(plain) == count(layer)
    leaves = {type(m).__name__ for m in plain.modules() if not list(m.children())}
    assert leaves == {type(layer).__name__.removeprefix("LowRank")}
    torch.testing.assert_close(torch.fx.symbolic_trace(plain)(x), plain(x))


@pytest.mark.parametrize("slices", [1, 4])
def test_a_model_computes_what_it_did(slices):
    small = mixed(slices)
    before = copy.deepcopy(small)
    plain = alds.to_plain(small)
    assert sum(isinstance(m, LowRankLayer) for m in small.modules()) == 4
    assert not any(isinstance(m, LowRankLayer) for m in plain.modules())
    torch.testing.assert_close(plain(X), small(X))
    assert slices > 1 or torch.equal(plain(X), small(X))
    assert torch.equal(before(X), small(X)) and parameters(plain) == parameters(small)
    for p in plain.parameters():  # nothing is shared with the model that was given
        p.data.zero_()
    assert torch.equal(before(X), small(X))


@pytest.mark.parametrize("slices", [1, 4])
def test_parameters_stay_as_they_are(slices):
    small = mixed(slices).to(torch.bfloat16)
    small.body[0].encoder.requires_grad = False
    small.head[0].weight.requires_grad = False
    small.head.train()
    plain = alds.to_plain(small)
    assert {p.dtype for p in plain.parameters()} == {torch.bfloat16}
    frozen = [name for name, p in plain.named_parameters() if not p.requires_grad]
    several = [f"head.0.encoder.rest.slices.{i}.weight" for i in range(4)] + ["head.0.decoder.weight"]
    one = ["head.0.encoder.weight", "head.0.decoder.rest.weight"]
    assert frozen == ["body.0.encoder.weight", *(several if slices == 4 else one)]
    assert all(m.training for m in plain.head.modules()) and not any(m.training for m in plain.body.modules())
    plain(X.bfloat16()).float().square().mean().backward()
    assert all((p.grad is not None) == p.requires_grad for p in plain.parameters())


def test_layers_that_are_used_twice_or_share_parameters_stay_so():
    layer, other = alds.LowRankLinear(8, 8, 2), alds.LowRankLinear(8, 8, 2)
    other.decoder, other.bias = layer.decoder, layer.bias
    model = nn.ModuleDict({"a": layer, "b": layer, "c": other, "rest": nn.Linear(8, 8)})
    model["rest"].bias = layer.bias
    plain = alds.to_plain(model)
    assert plain["a"] is plain["b"] and plain["c"] is not plain["a"]
    assert plain["c"].decoder.weight is plain["a"].decoder.weight
    assert plain["rest"].bias is plain["a"].decoder.bias is plain["c"].decoder.bias
    assert count(plain) == count(model)


def test_attributes_of_the_dense_layer_stay():
    plain = alds.to_plain(alds.LowRankConv2d(4, 6, 3, 1, conv_groups=2, groups=2, stride=2, padding=1))
    assert (plain.in_channels, plain.out_channels, plain.kernel_size, plain.groups) == (4, 6, (3, 3), 2)
    assert (plain.stride, plain.padding, plain.weight.shape) == ((2, 2), (1, 1), (6, 2, 3, 3))
    plain = alds.to_plain(alds.LowRankLinear(12, 6, 2))
    assert (plain.in_features, plain.out_features, plain.weight.dtype) == (12, 6, torch.float32)
    plain.half().weight.requires_grad = False
    assert plain.weight.dtype == torch.float16
    assert [p.requires_grad for p in plain.parameters()] == [False, False, True]
    with pytest.raises(AttributeError, match="plain form of LowRankLinear has no dense weight"):
        plain.weight + 1
    unpickled = pickle.loads(pickle.dumps(plain))
    assert unpickled.weight.shape == (6, 12) and copy.deepcopy(plain).in_features == 12


@pytest.mark.parametrize("slices", [1, 4])
def test_it_traces_scripts_and_exports(slices):
    plain = alds.to_plain(mixed(slices))
    for form in (torch.fx.symbolic_trace(plain), torch.jit.script(plain), torch.export.export(plain, (X,)).module()):
        torch.testing.assert_close(form(X), plain(X))
    other = X[:1, :, :5]  # neither the batch nor the sizes are written down
    torch.testing.assert_close(torch.jit.script(plain)(other), plain(other))
    torch.testing.assert_close(torch.fx.symbolic_trace(plain)(other), plain(other))


def test_a_script_of_the_compressed_model_says_what_to_do():
    small = mixed(1)
    before = list(small.modules())
    kind = next(type(module).__name__ for module in before if isinstance(module, LowRankLayer))
    with pytest.raises(ModelError, match=rf"torch.jit.script cannot compile {kind}; script alds_fast.to_plain"):
        torch.jit.script(small)
    assert list(small.modules()) == before
    torch.testing.assert_close(torch.jit.trace(small, X)(X), small(X))


@pytest.mark.parametrize("layer", [alds.LowRankLinear(8, 8, 2, groups=2), alds.LowRankConv2d(4, 6, 3, 2)])
def test_a_trace_of_the_compressed_model_says_what_to_do(layer):
    with pytest.raises(ModelError, match=rf"torch.fx cannot trace {type(layer).__name__}; trace .*to_plain"):
        torch.fx.symbolic_trace(nn.Sequential(layer))


def test_features_are_taken_out_by_a_trace():
    """As torchvision's create_feature_extractor does: the graph up to a node."""
    plain = alds.to_plain(mixed(1))
    graph = torch.fx.symbolic_trace(plain).graph
    node = next(n for n in graph.nodes if n.target == "body.0.decoder.rest")
    for last in [n for n in graph.nodes if n.op == "output"]:
        last.args = (node,)
    graph.eliminate_dead_code()
    torch.testing.assert_close(
        torch.fx.GraphModule(plain, graph)(X), plain.body[0].decoder.rest(plain.body[0].encoder(X))
    )


def near(y, wanted):
    """Within what eight bits leave."""
    return float((y - wanted).detach().norm() / wanted.detach().norm()) < 0.05


@pytest.mark.parametrize("slices", [1, 4])
def test_torchao_quantises_every_linear_part(slices):
    torchao = pytest.importorskip("torchao.quantization")
    plain = alds.to_plain(mixed(slices)).requires_grad_(False)
    wanted, linears = plain(X), [m for m in plain.modules() if isinstance(m, nn.Linear)]
    torchao.quantize_(plain, torchao.Int8WeightOnlyConfig())
    assert len(linears) == (4 if slices == 1 else 10)
    assert all(type(m.weight.data) is not torch.Tensor for m in linears)
    assert near(plain(X), wanted) and not torch.equal(plain(X), wanted)


@pytest.mark.parametrize("slices", [1, 4])
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_quantize_dynamic_quantises_every_linear_part(slices):
    plain = alds.to_plain(mixed(slices))
    quantised = torch.ao.quantization.quantize_dynamic(plain, {nn.Linear}, dtype=torch.qint8)
    assert not any(type(m) is nn.Linear for m in quantised.modules())
    assert near(quantised(X), plain(X))


@pytest.mark.parametrize("slices", [1, 4])
def test_peft_adapts_every_linear_part(slices):
    peft = pytest.importorskip("peft")
    plain = alds.to_plain(mixed(slices))
    names = {name for name, m in plain.named_modules() if isinstance(m, nn.Linear)}
    wanted = plain(X)
    adapted = peft.get_peft_model(plain, peft.LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False))
    assert adapted.peft_config["default"].target_modules == names
    y = adapted(X)
    assert not torch.allclose(y, wanted)
    torch.testing.assert_close(adapted.merge_and_unload()(X), y)


@pytest.mark.parametrize("slices", [1, slow(4)])
def test_onnx_computes_the_same(slices, tmp_path):
    pytest.importorskip("onnxscript")
    runtime = pytest.importorskip("onnxruntime")
    plain, path = alds.to_plain(mixed(slices)), tmp_path / "plain.onnx"
    torch.onnx.export(plain, (X,), path, dynamo=True, verbose=False)
    session = runtime.InferenceSession(path)
    (y,) = session.run(None, {session.get_inputs()[0].name: X.numpy()})
    torch.testing.assert_close(torch.from_numpy(y), plain(X))


def test_onnx_of_low_rank_layers_themselves(tmp_path):
    """With output and with input pivots."""
    pytest.importorskip("onnxscript")
    runtime = pytest.importorskip("onnxruntime")
    path = tmp_path / "small.onnx"
    pivoted = alds.LowRankConv2d(8, 32, 1, 5, pivots="output")
    model = nn.Sequential(pivoted, nn.ReLU(), alds.LowRankConv2d(32, 12, 3, 4, scheme=3, groups=2, pivots="input"))
    model, x = nn.Sequential(*model, nn.Flatten(2), alds.LowRankLinear(16, 24, 5, pivots="output")).eval(), X
    torch.onnx.export(model, (x,), path, dynamo=True, verbose=False)
    session = runtime.InferenceSession(path)
    (y,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    torch.testing.assert_close(torch.from_numpy(y), model(x), rtol=1e-4, atol=1e-5)


def test_the_plain_form_is_compressed():
    plain = alds.to_plain(mixed(1))
    smaller = alds.compress(plain, params=0.9)
    assert count(smaller) <= 0.9 * count(plain) and smaller(X).shape == plain(X).shape


@torch.no_grad()
def test_encoders_of_torch_run():
    """Their fused path reads the weights of linear layers by name."""
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(32, 4, 64, batch_first=True), 2).eval()
    small, x = alds.compress(encoder, params=0.7), torch.randn(2, 5, 32)
    plain = alds.to_plain(small)
    assert any(isinstance(layer.linear1, nn.Sequential) for layer in plain.layers)
    torch.testing.assert_close(plain(x), small(x))
    padding = torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
    torch.testing.assert_close(
        plain(x, src_key_padding_mask=padding)[1, :3], small(x, src_key_padding_mask=padding)[1, :3]
    )
    assert alds.compress(plain, params=0.9)(x).shape == x.shape


@pytest.mark.parametrize("kind", ["llama", *(slow(kind) for kind in ("gpt2", "bert", "vit"))])
def test_models_of_transformers(kind, tmp_path):
    pytest.importorskip("transformers")
    small = alds.compress(checkpoints.dense(kind), params=0.5)
    plain, batch = alds.to_plain(small), checkpoints.inputs(kind)
    with torch.no_grad():
        torch.testing.assert_close(plain(**batch).logits, small(**batch).logits)
    assert parameters(plain) == parameters(small)
    with pytest.raises(ModelError, match="save the compressed model and call to_plain after loading it"):
        plain.save_pretrained(tmp_path / "plain")
    assert not hasattr(plain.config, "quantization_config") and small.config.quantization_config.layers
    small.save_pretrained(tmp_path / "small")
    assert any(isinstance(m, LowRankLayer) for m in alds.from_pretrained(tmp_path / "small").modules())


def test_it_is_no_compressed_model(tmp_path):
    with pytest.raises(ModelError, match="no low-rank layer and no plan"):
        alds.save(alds.to_plain(mixed(1)), tmp_path / "plain.safetensors")


def merged():
    layers = [alds.LowRankLinear(8, 8, 2) for _ in range(2)]
    both = MergedLinears(layers)
    return nn.Sequential(MergedPart(both, 0), alds.LowRankLinear(8, 8, 2))


def with_hook():
    model = nn.Sequential(alds.LowRankLinear(8, 8, 2))
    model[0].register_forward_hook(lambda *_: None)
    return model


def with_parametrization():
    model = nn.Sequential(alds.LowRankLinear(8, 8, 2))
    parametrize.register_parametrization(model[0], "encoder", nn.Identity())
    return model


def with_forward():
    model = nn.Sequential(alds.LowRankLinear(8, 8, 2))
    model[0].forward = lambda x: x
    return model


def with_a_subclass():
    class Own(alds.LowRankLinear):
        pass

    return nn.Sequential(Own(8, 8, 2))


def with_a_buffer():
    model = nn.Sequential(alds.LowRankLinear(8, 8, 2))
    model[0].register_buffer("steps", torch.zeros(1))
    return model


def with_shared_slices():
    model = nn.Sequential(*(alds.LowRankLinear(8, 8, 2, groups=2) for _ in range(2)))
    model[1].encoder = model[0].encoder
    return model


def with_an_adapter():
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=["0"])
    model = peft.get_peft_model(nn.Sequential(nn.Linear(8, 8)), config)
    model.base_model.model[0].base_layer = alds.LowRankLinear(8, 8, 2)
    return model


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (small_net, "no low-rank layer; pass one made by compress"),
        (merged, "pass the model that was given to deploy"),
        (with_hook, r"layer '0' has no plain form: it has hooks.*remove them"),
        (with_parametrization, r"layer '0' has no plain form: it is parametrized; remove"),
        (with_forward, r"layer '0' has no plain form: it has a forward of its own.*remove it"),
        (with_a_subclass, r"layer '0' has no plain form: Own is a subclass; use"),
        (with_a_buffer, r"layer '0' has no plain form: it has parameters, buffers.*remove them"),
        (with_shared_slices, r"layer '0' has no plain form: it shares its encoder, of 2 slices.*give it a copy"),
        (with_an_adapter, "holds an adapter of a low-rank layer; merge or unload"),
        (lambda: images(), "pass the torch.nn.Module itself"),
    ],
)
def test_what_has_no_plain_form_is_refused(build, message):
    with pytest.raises(ModelError, match=message):
        alds.to_plain(build())
