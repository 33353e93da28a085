"""quantize_factors: what int8 factors cost, and that whatever takes low-rank layers takes these or says why not."""

import copy
import logging
import pickle

import pytest
import torch
from support.marks import slow
from torch import nn

import alds_fast as alds
from alds_fast.deployment import autotune
from alds_fast.errors import ArgumentError, BackendError, BudgetError, FileFormatError, ModelError, WeightError
from alds_fast.layers import Int8LowRankLinear, MergedLinears, MergedPart, count_bytes, count_params
from alds_fast.linalg import Decomposition, WeightShape, slice_factors

FORMS = {
    "plain": {}, "slices": {"groups": 4}, "output": {"pivots": "output"}, "input": {"pivots": "input", "groups": 2},
}  # fmt: skip


def layer(rank=6, bias=True, features=(32, 24), **options):
    torch.manual_seed(0)
    return alds.LowRankLinear.from_dense(nn.Linear(*features, bias=bias), rank=rank, **options).eval()


def int8(dense_or_low):
    return alds.quantize_factors(nn.Sequential(dense_or_low))[0]


def net():
    """Two low-rank linear layers and a convolution."""
    torch.manual_seed(0)
    conv = alds.LowRankConv2d(3, 8, 3, 2, padding=1)
    return nn.Sequential(conv, nn.Flatten(), layer(5, features=(8 * 16, 24)), nn.ReLU(), layer(4, features=(24, 10)))


def relative(a, b):
    return float((a.double() - b.double()).detach().norm() / b.detach().double().norm())


# ------------------------------------------------------------------------------------- the layer


@pytest.mark.parametrize("options", FORMS.values(), ids=FORMS)
def test_it_is_the_layer_of_the_rounded_factors(options):
    low, x = layer(**options), torch.randn(5, 32)
    new = int8(low)
    for name in ("encoder", "decoder"):
        old, made, values = getattr(low, name), getattr(new, name), getattr(new, f"{name}_int8")
        steps = old.detach().abs().amax(1, keepdim=True) / 127
        assert values.dtype == torch.int8 and bool((values.abs().amax(1) == 127).all())
        assert bool(((made - old).abs() <= 0.5001 * steps).all())
        assert made.dtype == old.dtype and not made.requires_grad
    with torch.no_grad():
        dense = new.to_dense()
        torch.testing.assert_close(new(x), dense(x), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(new(x), low(x), rtol=5e-2, atol=5e-2)
        torch.testing.assert_close(dense.weight, new.dense_weight())
    assert repr(new).endswith("int8)") and new.decomposition == low.decomposition
    assert torch.equal(new.bias, low.bias) and new.bias is not low.bias


@pytest.mark.parametrize("options", FORMS.values(), ids=FORMS)
@pytest.mark.parametrize("rows", [1, 3, 20])
def test_backends_agree(options, rows):
    new, x = int8(layer(**options)), torch.randn(rows, 32)
    results = []
    with torch.no_grad():
        for backend in ("auto", "two-op", "fused", "fused-first"):
            new.backend = backend
            if backend == "fused" and options.get("pivots") == "input":
                assert "output pivots of a Linear" in new.why_not_fused(x)
                with pytest.raises(BackendError, match="output pivots of a Linear"):
                    new(x)
            else:
                results.append(new(x))
    for y in results[1:]:
        torch.testing.assert_close(y, results[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, slow(torch.bfloat16), torch.float64])
def test_types(dtype):
    """Scales follow, integers stay; quantised in that type the scales' own rounding adds nothing."""
    low = layer(pivots="output")
    new, x = int8(low), torch.randn(4, 32)
    moved = copy.deepcopy(new).to(dtype)
    types = {name: t.dtype for name, t in moved.state_dict().items()}
    assert types == {
        "bias": dtype, "order": torch.int64, "encoder_int8": torch.int8, "decoder_int8": torch.int8,
        "encoder_scale": dtype, "decoder_scale": dtype,
    }  # fmt: skip
    assert moved.weight.dtype == dtype and moved.weight.shape == (24, 32) and moved.weight.device == x.device
    assert torch.equal(moved.encoder_int8, new.encoder_int8)
    with torch.no_grad():
        assert relative(moved(x.to(dtype)), new(x)) < 10 * torch.finfo(dtype).eps + 1e-6
    later, before = int8(copy.deepcopy(low).to(dtype)), copy.deepcopy(low).to(dtype)
    steps = later.encoder_scale.double().unsqueeze(1)
    values = later.encoder_int8 * steps
    assert bool(((values - before.encoder.detach().double()).abs() <= 0.505 * steps).all())


def test_state_dicts_copies_and_pickles():
    new, x = int8(layer(pivots="output")), torch.randn(3, 32)
    other = Int8LowRankLinear.of(alds.LowRankLinear(32, 24, 6, pivots="output"))
    assert not torch.equal(other(x), new(x))
    other.load_state_dict(new.state_dict())
    for twin in (other, copy.deepcopy(new), pickle.loads(pickle.dumps(new))):
        assert torch.equal(twin(x), new(x)) and twin.encoder_int8 is not new.encoder_int8
    assert not [name for name, _ in new.named_parameters() if name != "bias"]


def test_rows_of_zeros_and_values_of_any_size():
    low = layer()
    with torch.no_grad():
        low.encoder[1] = 0
        low.decoder[3] = 0
        low.decoder[4] *= 1e20
        low.decoder[5] *= 1e-20
    new, table = alds.quantize_factors(nn.Sequential(low), report=True)
    assert new[0].encoder_scale[1] == 0 and bool(torch.isfinite(new[0].dense_weight()).all())
    assert table.rows[0].decoder_error < 0.01
    for row in (4, 5):
        assert relative(new[0].decoder[row], low.decoder[row]) < 0.01


def test_only_bias_and_input_have_gradients():
    new, x = int8(layer()), torch.randn(3, 32, requires_grad=True)
    for backend in ("two-op", "fused"):
        new.backend = backend
        new.zero_grad()
        new(x).sum().backward()
        assert torch.equal(new.bias.grad, torch.full((24,), 3.0))
        torch.testing.assert_close(x.grad[0], new.dense_weight().sum(0))
        x.grad = None


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda m: setattr(m, "encoder", m.encoder), AttributeError, "encoder is int8 and cannot be set"),
        (lambda m: setattr(m, "decoder", None), AttributeError, "decoder is int8 and cannot be set"),
        (lambda m: m.reset_parameters(), ModelError, "int8 factors are not initialised"),
        (lambda m: m.weight.requires_grad_(), AttributeError, "are int8 and cannot be trained"),
        (lambda m: Int8LowRankLinear(4, 4, 2), ModelError, "made by alds_fast.quantize_factors"),
        (lambda m: Int8LowRankLinear.from_dense(nn.Linear(4, 4), rank=2), ModelError, "made by alds_fast"),
    ],
)
def test_what_such_a_layer_refuses(call, error, message):
    with pytest.raises(error, match=message):
        call(int8(layer()))


@pytest.mark.slow
@pytest.mark.parametrize("options", FORMS.values(), ids=FORMS)
def test_compile_and_export(options):
    torch._dynamo.reset()
    new, x = int8(layer(**options)), torch.randn(3, 32)
    for backend in ("auto", "fused-first"):
        new.backend = backend
        compiled = torch.compile(new, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(x), new(x), rtol=1e-5, atol=1e-5)
        program = torch.export.export(new, (x,))
        torch.testing.assert_close(program.module()(x), new(x), rtol=1e-5, atol=1e-5)


# ------------------------------------------------------------------------------------- quantize_factors


@pytest.mark.parametrize("options", FORMS.values(), ids=FORMS)
def test_the_errors_are_those_of_the_dense_weights(options):
    low = layer(**options)
    (new,), table = alds.quantize_factors(nn.Sequential(low), report=True)
    row = table.rows[0]
    assert row.weight_error == pytest.approx(relative(new.dense_weight(), low.dense_weight()), rel=1e-3)
    assert row.encoder_error == pytest.approx(relative(new.encoder, low.encoder), rel=1e-4)
    assert row.decoder_error == pytest.approx(relative(new.decoder, low.decoder), rel=1e-4)
    factors = low.encoder.numel() + low.decoder.numel()
    rows = low.encoder.shape[0] + low.decoder.shape[0]
    assert (row.bytes_before, row.bytes_after) == (4 * factors, factors + 4 * rows)
    assert count_bytes(nn.Sequential(low)) - count_bytes(nn.Sequential(new)) == 3 * factors - 4 * rows
    assert count_params(new) - count_params(low) == rows


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gaussian_factors_lose_less_than_one_percent(dtype):
    shape, decomposition = WeightShape(512, 768), Decomposition(0, 1, 64)
    low = alds.LowRankLinear(768, 512, 64, dtype=dtype)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for factor in (low.encoder, low.decoder):
            factor.copy_(torch.randn(factor.shape, generator=generator))
    assert slice_factors(low.encoder, low.decoder, shape, *decomposition.fold)[0].shape == (1, 1, 512, 64)
    _, table = alds.quantize_factors(nn.Sequential(low), report=True)
    assert 0.005 < table.rows[0].weight_error < 0.01


def test_other_layers_are_left_and_named(caplog):
    model = net()
    before = {name: t.clone() for name, t in model.state_dict().items()}
    with caplog.at_level(logging.INFO, logger="alds_fast"):
        new, table = alds.quantize_factors(model, report=True)
    assert [name for name, m in new.named_children() if isinstance(m, Int8LowRankLinear)] == ["2", "4"]
    assert [row.name for row in table.rows] == ["2", "4"] and list(table.left_out) == ["0"]
    text = str(table)
    assert "layer '0' is left as it is: int8 factors are for LowRankLinear, it is a LowRankConv2d" in text
    assert table.summary in text and "1 layers are left" in table.summary
    assert caplog.messages == [f"quantize_factors: {table.summary}"]
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    x = torch.randn(2, 3, 4, 4)
    assert relative(new(x), model(x)) < 0.05
    assert type(alds.quantize_factors(model)) is nn.Sequential


def test_hooks_and_shared_factors_keep_their_layers():
    model = nn.Sequential(layer(), nn.Identity(), layer(features=(24, 24)), layer(features=(24, 24)))
    model[0].register_forward_hook(lambda *args: None)
    _, table = alds.quantize_factors(model, report=True)
    assert list(table.left_out) == ["0"] and "hooks" in table.left_out["0"]
    model[3].encoder = model[2].encoder
    with pytest.raises(ModelError, match="no low-rank linear layer that can .* '0': .* '2': .* '3': "):
        alds.quantize_factors(model)


def test_a_layer_used_twice_is_one_afterwards_too():
    low = layer(features=(24, 24))
    new, table = alds.quantize_factors(nn.Sequential(low, nn.ReLU(), low), report=True)
    assert new[0] is new[2] and len(table.rows) == 1 and isinstance(new[0], Int8LowRankLinear)


@pytest.mark.parametrize(
    ("model", "options", "error", "message"),
    [
        (lambda: "model.pt", {}, ModelError, "is a text"),
        (lambda: nn.Sequential(nn.Linear(4, 4)), {}, ModelError, "no low-rank linear layer .* compress"),
        (
            lambda: nn.Sequential(alds.LowRankConv1d(4, 4, 3, 2)),
            {},
            ModelError,
            "'0': int8 factors are for LowRankLinear",
        ),
        (net, {"kind": "int4"}, ArgumentError, "kind='int4' is not 'int8'"),
        (net, {"report": 1}, ArgumentError, "report=1 is not True or False"),
        (lambda: alds.quantize_factors(net()), {}, ModelError, "layer '2' has int8 factors already"),
        (lambda: net().to("meta"), {}, WeightError, "layer '2': its encoder is on the meta device"),
    ],
)
def test_refusals(model, options, error, message):
    with pytest.raises(error, match=message):
        alds.quantize_factors(model(), **options)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_none_are_refused(value):
    model = net()
    with torch.no_grad():
        model[4].decoder[1, 2] = value
    with pytest.raises(WeightError, match="layer '4': 1 of 40 values of its decoder are NaN or infinite"):
        alds.quantize_factors(model)


# ------------------------------------------------------------------------------------- with the rest of the library


def test_saved_and_loaded_it_has_the_same_bits(tmp_path):
    dense = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 32, bias=False))
    small = alds.compress(dense, params=0.5)
    for model in (alds.quantize_factors(small), alds.quantize_factors(small).half()):
        alds.save(model, tmp_path / "small.safetensors")
        loaded = alds.load(tmp_path / "small.safetensors", dense)
        assert [type(m) for m in loaded] == [type(m) for m in model]
        state = loaded.state_dict()
        assert state.keys() == model.state_dict().keys()
        assert all(state[n].dtype == t.dtype and torch.equal(state[n], t) for n, t in model.state_dict().items())
        assert loaded.alds_plan == small.alds_plan
    alds.save(small, tmp_path / "floating.safetensors")
    assert (tmp_path / "small.safetensors").stat().st_size < (tmp_path / "floating.safetensors").stat().st_size / 2


def test_the_file_says_so_in_a_version_of_its_own(tmp_path, monkeypatch):
    from safetensors import safe_open

    dense = nn.Sequential(nn.Linear(64, 64))
    small = alds.compress(dense, params=0.5)
    for model, version in ((small, "1"), (alds.quantize_factors(small), "3")):
        alds.save(model, tmp_path / "m.safetensors")
        with safe_open(tmp_path / "m.safetensors", "pt") as file:
            metadata = file.metadata()
        assert metadata["version"] == version and ('"factors": "int8"' in metadata["layers"]) == (version == "3")
    monkeypatch.setattr("alds_fast.integrations.stored_layers.INT8", "int4")
    with pytest.raises(FileFormatError, match="factors='int8' of a LowRankLinear are not known"):
        alds.load(tmp_path / "m.safetensors", dense)


def test_what_trains_or_compresses_refuses_it():
    torch.manual_seed(0)
    dense = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 32))
    small = alds.quantize_factors(alds.compress(dense, params=0.5))
    data = [(torch.randn(4, 64),)] * 4
    with pytest.raises(BudgetError, match="its factors are int8; compress first"):
        alds.compress(small, params=0.5)
    with pytest.raises(ModelError, match="'0' is a low-rank layer"):
        alds.retrain(small, keep=0.5, epochs=1)
    for train in (alds.distill, alds.refine):
        with pytest.raises(ModelError, match="layer '0' has int8 factors: .* first, then alds_fast.quantize_factors"):
            train(small, dense, data)
    with pytest.raises(ModelError, match="layer '0' has no plain form: its factors are int8"):
        alds.to_plain(small)
    analysis = alds.analyze(small)
    assert [(layer.weight, layer.params) for layer in analysis.layers] == [
        (weight, count_params(m)) for weight, m in (((64, 64), small[0]), ((32, 64), small[2]))
    ]


def test_deploy_times_dense_two_calls_and_the_kernel():
    model, x = nn.Sequential(layer(), nn.ReLU(), layer(features=(24, 24), pivots="output")), torch.randn(3, 32)
    small = alds.quantize_factors(model).eval()
    fast, table = alds.deploy(small, x, rounds=1, report=True)
    for row in table.rows:
        assert set(row.times_ms) == {"dense", "two-op", "fused"} and row.kind == "Int8LowRankLinear"
        assert max(row.errors.values()) < 1e-5
    torch.testing.assert_close(fast(x), small(x), rtol=1e-5, atol=1e-5)
    for backend in ("two-op", "fused"):
        forced = alds.deploy(small, x, backend=backend, rounds=1)
        assert isinstance(forced[0], Int8LowRankLinear) and forced[0].backend == backend
        torch.testing.assert_close(forced(x), small(x), rtol=1e-5, atol=1e-5)


class Attention(nn.Module):
    def __init__(self, *layers):
        super().__init__()
        self.q, self.k, self.v = layers

    def forward(self, x):
        return self.q(x) * self.k(x) + self.v(x)


@pytest.mark.parametrize("pivots", ["", "output"])
@pytest.mark.parametrize("rows", [1, 3, 20])
def test_merged_layers_keep_their_integers(rows, pivots):
    layers = [int8(layer(r, bias=b, features=(32, f), pivots=pivots)) for r, f, b in ((6, 24, True), (5, 40, False))]
    x = torch.randn(rows, 32)
    with torch.no_grad():
        for backend in ("two-op", "fused", "auto"):
            if backend == "fused" and rows > 16:
                continue
            merged = MergedLinears(layers, backend)
            assert merged.encoder.dtype == merged.decoders[0].dtype == torch.int8 and ", int8" in repr(merged)
            for y, one in zip(merged(x), layers, strict=True):
                torch.testing.assert_close(y, one(x), rtol=1e-5, atol=1e-5)
            for i, one in enumerate(layers):
                torch.testing.assert_close(merged._alone(x, i), one(x), rtol=1e-5, atol=1e-5)
    assert count_bytes(merged) < sum(count_bytes(one.to_dense()) for one in layers) / 3


def test_deploy_merges_them(monkeypatch):
    def interleaved_ms(calls, device, *, rounds):
        return {name: [0.1 if name == "fused" else 1.0] * rounds for name in calls}

    monkeypatch.setattr(autotune, "interleaved_ms", interleaved_ms)
    low = [layer(4, features=(32, 32), pivots=pivots) for pivots in ("", "output", "output")]
    small, x = alds.quantize_factors(Attention(*low)).eval(), torch.randn(2, 32)
    _, table = alds.deploy(small, x, rounds=1, report=True)
    assert table.rows[-1].kind == "merged" and table.rows[-1].won == "fused" and len(table.rows) == 4
    with torch.no_grad():
        part = MergedPart(MergedLinears([small.q, small.k, small.v]), 1)
        torch.testing.assert_close(part(x), small.k(x), rtol=1e-5, atol=1e-5)
    mixed = Attention(small.q, low[1], small.v).eval()
    _, table = alds.deploy(mixed, x, rounds=1, report=True)
    assert [row.kind for row in table.rows] == ["Int8LowRankLinear", "LowRankLinear", "Int8LowRankLinear"]
    with pytest.raises(ArgumentError, match="1 of 2 layers to merge have no int8 factors"):
        MergedLinears([mixed.q, mixed.k])
