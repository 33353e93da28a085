"""Models wrapped by peft: base layers are compressed, adapters stay whole, and peft's calls work."""

import pytest
import torch
from torch import nn

import alds_fast as alds
from alds_fast.layers import find_layers

peft = pytest.importorskip("peft")
X = torch.randn(5, 32, generator=torch.Generator().manual_seed(0))


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc, self.body, self.head = nn.Linear(32, 64), nn.Linear(64, 64), nn.Linear(64, 8)

    def forward(self, x):
        return self.head(self.body(self.fc(x)).relu())


def wrapped(kind="LoraConfig", **options):
    """A model with an adapter of peft on ``fc`` that has been trained a little."""
    torch.manual_seed(0)
    options = {"target_modules": ["fc"], **options}
    model = peft.get_peft_model(Net(), getattr(peft, kind)(**options)).eval()
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p += 0.1 * torch.randn_like(p)
    return model


def reasons(model):
    return {layer.name.removeprefix("base_model.model."): layer.reason for layer in find_layers(model)}


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("LoraConfig", {"r": 4}),
        ("LoraConfig", {"r": 4, "modules_to_save": ["head"]}),
        ("IA3Config", {"feedforward_modules": []}),
        ("LoHaConfig", {"r": 4}),
        ("LoKrConfig", {"r": 4}),
    ],
    ids=["lora", "lora and a head", "ia3", "loha", "lokr"],
)
@pytest.mark.parametrize("data", [False, True], ids=["alone", "data"])
def test_base_layers_are_compressed_and_adapters_stay_whole(kind, options, data, tmp_path):
    model = wrapped(kind, **options)
    small = alds.compress(model, params=0.7, **({"data": [X]} if data else {}))
    low = {n.removeprefix("base_model.model.") for n, m in small.named_modules() if isinstance(m, alds.LowRankLinear)}
    assert low - {"head"} == {"fc.base_layer", "body"}
    small.save_pretrained(tmp_path)
    original = peft.PeftModel.from_pretrained(Net(), tmp_path)
    kept, saved = (peft.get_peft_model_state_dict(m) for m in (model, original))
    assert kept.keys() == saved.keys() and all(torch.equal(kept[name], saved[name]) for name in kept)
    with small.disable_adapter():
        without = small(X)
    assert not torch.allclose(without, small(X))
    torch.testing.assert_close(small.unload()(X), without) if "modules_to_save" not in options else small.unload()(X)


@pytest.mark.parametrize("adapters", [1, 2])
def test_lora_merges_into_the_factors_of_a_compressed_base(adapters, tmp_path):
    model = wrapped(r=3)
    if adapters == 2:
        model.add_adapter("more", peft.LoraConfig(r=2, target_modules=["fc"], init_lora_weights=False))
        model.base_model.set_adapter(["default", "more"])
    small = alds.compress(model.eval(), params=0.6)
    layer = small.base_model.model.fc.base_layer
    rank, y = layer.rank, small(X)
    small.merge_adapter()
    assert layer.rank > rank
    torch.testing.assert_close(small(X), y, rtol=1e-4, atol=1e-4)
    small.unmerge_adapter()
    assert layer.rank == rank
    torch.testing.assert_close(small(X), y)
    small.save_pretrained(tmp_path)
    merged = small.merge_and_unload()
    torch.testing.assert_close(merged(X), y, rtol=1e-4, atol=1e-4)
    assert isinstance(merged.fc, alds.LowRankLinear) and not any("lora" in n for n, _ in merged.named_modules())
    whole = peft.PeftModel.from_pretrained(Net(), tmp_path)
    assert all(map(torch.equal, *(peft.get_peft_model_state_dict(m).values() for m in (model, whole))))


def test_adapters_and_what_peft_saves_are_left_alone():
    why = reasons(wrapped(r=4, modules_to_save=["head"]))
    assert why["fc.base_layer"] is None and why["body"] is None
    others = [reason for name, reason in why.items() if name not in ("fc.base_layer", "body")]
    assert len(others) == 4 and all("it belongs to an adapter of peft" in reason for reason in others)


@pytest.mark.parametrize(
    ("kind", "options"),
    [("LoraConfig", {"r": 4, "use_dora": True}), ("BOFTConfig", {"boft_block_size": 4}), ("HRAConfig", {"r": 4})],
    ids=["dora", "boft", "hra"],
)
def test_base_layers_whose_weight_an_adapter_computes_with_stay_dense(kind, options):
    model = wrapped(kind, **options)
    assert "layers may compute with its weight" in reasons(model)["fc.base_layer"]
    small = alds.compress(model, params=0.8)
    assert isinstance(small.base_model.model.body, alds.LowRankLinear) and small(X).isfinite().all()
    before = small(X)
    torch.testing.assert_close(small.merge_and_unload()(X), before, rtol=1e-4, atol=1e-4)


def test_a_merged_adapter_is_to_be_unmerged_first():
    model = wrapped(r=4)
    model.merge_adapter()
    assert "peft has merged an adapter into its weight" in reasons(model)["fc.base_layer"]
    model.unmerge_adapter()
    assert reasons(model)["fc.base_layer"] is None


def test_merging_first_and_then_compressing():
    small = alds.compress(wrapped(r=4).merge_and_unload(), params=0.5)
    assert isinstance(small, Net) and isinstance(small.fc, alds.LowRankLinear)
