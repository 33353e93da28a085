"""nn.MultiheadAttention is opened: the same outputs, its four projections decomposed one by one."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize, prune

import alds_fast as alds
from alds_fast.layers import LowRankLayer, OpenedAttention, find_layers, opened, opened_for

HEADS, WIDTH, KEYS, QUERIES, SAMPLES = 2, 8, 5, 3, 4
PARTS = ["q_proj", "k_proj", "v_proj", "out_proj"]
KINDS = {
    "plain": {},
    "batch first": {"batch_first": True},
    "other widths": {"kdim": 6, "vdim": 10, "batch_first": True},
    "no bias": {"bias": False},
    "learned key": {"add_bias_kv": True},
    "zero key": {"add_zero_attn": True, "add_bias_kv": True, "batch_first": True},
}


def attention(seed=0, **options):
    torch.manual_seed(seed)
    made = nn.MultiheadAttention(WIDTH, HEADS, **options).double().eval()
    for parameter in made.parameters():
        nn.init.normal_(parameter, std=0.3)  # biases are zero otherwise
    return made


def given(module, samples=SAMPLES):
    generator = torch.Generator().manual_seed(1)
    sizes = [(QUERIES, WIDTH), (KEYS, module.kdim), (KEYS, module.vdim)]
    tensors = [torch.randn(samples, *size, dtype=torch.float64, generator=generator) for size in sizes]
    return tensors if module.batch_first else [t.transpose(0, 1) for t in tensors]


def masks(kind):
    causal = torch.ones(QUERIES, KEYS, dtype=torch.bool).triu(1)
    padding = torch.zeros(SAMPLES, KEYS, dtype=torch.bool)
    padding[1, 3:] = True
    return {
        "none": {},
        "padding": {"key_padding_mask": padding},
        "added padding": {"key_padding_mask": padding.double() * -3},
        "causal": {"attn_mask": causal, "is_causal": True},
        "of heads": {"attn_mask": torch.randn(SAMPLES * HEADS, QUERIES, KEYS, dtype=torch.float64)},
        "both": {"attn_mask": causal, "key_padding_mask": padding},
    }[kind]


def close(got, wanted):
    for a, b in zip(got, wanted, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("mask", ["none", "padding", "added padding", "causal", "of heads", "both"])
def test_outputs_and_weights_are_those_of_the_module(kind, mask):
    module = attention(**KINDS[kind])
    same, x = OpenedAttention(module), given(module)
    for options in ({"need_weights": False}, {}, {"average_attn_weights": False}):
        options |= masks(mask)
        close(same(*x, **options), module(*x, **options))


@pytest.mark.parametrize("kind", KINDS)
def test_one_sample_without_its_dimension(kind):
    module = attention(**KINDS[kind])
    x = [t[0] if module.batch_first else t[:, 0] for t in given(module)]
    padding = torch.tensor([False] * 3 + [True] * 2)
    close(OpenedAttention(module)(*x, padding), module(*x, padding))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"key_padding_mask": torch.zeros(SAMPLES, KEYS - 1).bool()},
            r"key_padding_mask is \(4, 4\), expected \(4, 5\)",
        ),
        ({"key_padding_mask": torch.zeros(SAMPLES, KEYS + 1)}, r"key_padding_mask is \(4, 6\)"),
        (
            {"key_padding_mask": torch.zeros(SAMPLES, KEYS).long()},
            r"key_padding_mask is of torch.int64: expected a mask",
        ),
        ({"attn_mask": torch.zeros(QUERIES, KEYS + 1)}, r"attn_mask is \(3, 6\), expected \(3, 5\) or \(8, 3, 5\)"),
        ({"attn_mask": torch.zeros(SAMPLES, QUERIES, KEYS)}, r"attn_mask is \(4, 3, 5\)"),
        ({"attn_mask": torch.zeros(QUERIES, KEYS).int()}, r"attn_mask is of torch.int32"),
    ],
)
def test_masks_that_the_module_refuses_are_refused(options, message):
    module = attention()
    with pytest.raises((AssertionError, RuntimeError)):
        module(*given(module), **options)
    with pytest.raises(alds.errors.ArgumentError, match=message):
        opened(module)(*given(module), **options)


def test_gradients_and_dropout_are_those_of_the_module():
    module = attention(dropout=0.5).train()
    same = OpenedAttention(copy.deepcopy(module))
    for each in (module, same):
        torch.manual_seed(3)
        each(*given(module))[0].square().sum().backward()
    parts = torch.cat([same.get_submodule(name).weight.grad for name in PARTS[:3]])
    torch.testing.assert_close(parts, module.in_proj_weight.grad)
    assert same.training and not same.eval().training
    with pytest.raises(alds.AldsError, match="attn_mask"):
        same(*given(module), is_causal=True)


def test_at_full_rank_outputs_are_equal():
    module, full = attention(), OpenedAttention(attention())
    for name in PARTS:
        setattr(full, name, alds.LowRankLinear.from_dense(full.get_submodule(name), rank=WIDTH))
    close(full(*given(module)), module(*given(module)))


def encoder(layers=2, **options):
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(32, 4, 48, batch_first=True, **options)
    return nn.TransformerEncoder(layer, layers).eval()


def tokens(samples=6):
    return torch.randn(samples, 5, 32, generator=torch.Generator().manual_seed(2))


@torch.no_grad()
@pytest.mark.parametrize("options", [{}, {"sensitivity": True, "refit": True}])
@pytest.mark.filterwarnings("ignore:.*samples kept aside:UserWarning")
def test_an_encoder_is_compressed_saved_loaded_deployed_and_exported(options, tmp_path):
    model, x = encoder(), tokens()
    if options:
        options = {**options, "data": [tokens(40)]}
    before = copy.deepcopy(model.state_dict())
    small = alds.compress(model, params=0.4, **options)
    low = {name for name, m in small.named_modules() if isinstance(m, LowRankLayer)}
    assert {f"layers.0.self_attn.{part}" for part in PARTS} <= low
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert sum(p.numel() for p in small.parameters()) <= 0.4 * sum(p.numel() for p in model.parameters())
    padding = torch.zeros(6, 5, dtype=torch.bool)
    padding[0, 3:] = True
    assert small(x, src_key_padding_mask=padding).isfinite().all()  # torch's path of nested tensors is not taken
    alds.save(small, tmp_path / "small.st")
    assert torch.equal(alds.load(tmp_path / "small.st", encoder)(x), small(x))
    with torch.device("meta"):
        skeleton = encoder()
    assert torch.equal(alds.load(tmp_path / "small.st", skeleton)(x), small(x))
    torch.testing.assert_close(alds.deploy(small, x, rounds=1)(x), small(x))
    torch.testing.assert_close(torch.export.export(small, (x,)).module()(x), small(x))


def test_what_stays_dense_stays_as_it_is():
    model = encoder()
    small = alds.compress(model, params=0.8, include="*linear*")
    assert isinstance(small.layers[0].self_attn, nn.MultiheadAttention)
    some = alds.compress(model, params=0.95, include="layers.1.self_attn.out_proj")
    assert isinstance(some.layers[0].self_attn, nn.MultiheadAttention)
    assert type(some.layers[1].self_attn.q_proj) is nn.Linear
    torch.testing.assert_close(some.layers[1].self_attn.q_proj.weight, model.layers[1].self_attn.in_proj_weight[:32])
    kept = alds.analyze(model, exclude="layers.0.self_attn")
    reasons = {layer.name: layer.reason for layer in kept.layers}
    assert reasons["layers.0.self_attn"] == "matched by exclude=" and reasons["layers.1.self_attn.q_proj"] is None


def test_opening_shares_memory_and_happens_once():
    model = encoder()
    same = opened(model)
    assert opened(same) is same and opened_for(model, ["layers.0.linear1"]) is model
    with torch.no_grad():
        model.layers[0].self_attn.in_proj_weight.zero_()
    assert not same.layers[0].self_attn.k_proj.weight.any()
    assert same.layers[0].linear1.weight is model.layers[0].linear1.weight
    only = opened_for(model, ["layers.1.self_attn.out_proj"])
    kinds = [type(layer.self_attn) for layer in only.layers]
    assert kinds == [nn.MultiheadAttention, OpenedAttention]
    assert isinstance(opened(attention()), OpenedAttention)


class Own(nn.MultiheadAttention):
    def forward(self, x):
        return super().forward(x, x, x)[0]


class Reader(nn.Module):
    def __init__(self):
        super().__init__()
        self.attn = attention()

    def forward(self, x):
        return x @ self.attn.in_proj_weight


def hooked():
    made = attention()
    made.register_forward_hook(lambda module, args, y: y)
    return made


def parametrized():
    return parametrize.register_parametrization(attention(), "in_proj_weight", nn.Identity())


def pruned():
    return prune.l1_unstructured(attention(), "in_proj_weight", 0.5)


def shared():
    pair = nn.ModuleList([attention(), attention()])
    pair[1].in_proj_weight = pair[0].in_proj_weight
    return pair


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: Own(8, 2), "subclass of nn.MultiheadAttention with forward of its own"),
        (Reader, "the forward of Reader computes with its weight"),
        (hooked, "it has hooks"),
        (parametrized, "its in_proj_weight is parametrized"),
        (pruned, "pruning mask"),
        (shared, "its weights are shared"),
    ],
)
def test_what_is_not_opened_says_why(make, reason):
    analysis = alds.analyze(nn.Sequential(make(), nn.Linear(8, 8)))
    closed = [layer for layer in analysis.layers if layer.reason]
    assert len(closed) >= 2 and all(reason in layer.reason for layer in closed)
    assert len(analysis.spectra) == 1


def test_refine_and_distill_take_the_dense_model():
    model, batches = encoder(3), [tokens(3), tokens(5), tokens(4)]
    small = alds.compress(model, params=0.5)
    better, distance = alds.distill(small, model, batches, epochs=1)
    assert distance.after <= distance.before and better.alds_factors["layers.0.self_attn.q_proj"].error > 0
    refined, _ = alds.refine(small, model, batches, epochs=1)
    assert isinstance(refined.layers[0].self_attn, OpenedAttention)


def test_a_plan_in_json_opens_too():
    model, plan = encoder(), alds.analyze(encoder()).plan(params=0.5)
    small = alds.Plan.from_json(plan.to_json()).apply(model)
    assert isinstance(small.layers[0].self_attn, OpenedAttention)
    assert [layer.kind for layer in find_layers(small) if layer.kind == "MultiheadAttention"] == []


def test_the_class_that_was_opened_means_its_parts_everywhere():
    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.l = nn.MultiheadAttention(32, 4, batch_first=True), nn.Linear(32, 32)

        def forward(self, x):
            return self.l(self.a(x, x, x)[0])

    model, kind = Both(), nn.MultiheadAttention
    inside = {row.name for row in alds.analyze(model, include=kind).plan(params=0.8).layers if row.choice}
    assert inside and all(name.startswith("a.") for name in inside)
    analysis = alds.analyze(model)
    pinned = analysis.plan(params=0.9, pins={kind: "dense"})
    assert [row.name for row in pinned.layers if row.choice] == ["l"]
    by_class, by_name = (analysis.plan(params=0.7, importance={key: 5.0}) for key in (kind, "a"))
    assert [row.rank for row in by_class.layers] == [row.rank for row in by_name.layers]
