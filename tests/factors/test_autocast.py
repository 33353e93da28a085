"""Under torch.autocast weights are cast anew after every step: its cache would go on with what they were."""

import pytest
import torch
from torch import nn

import alds_fast as alds


def encoder():
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
    return nn.TransformerEncoder(layer, 3, enable_nested_tensor=False).eval()


def data():
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(4, 6, 16, generator=generator) for _ in range(8)]


def distilled(dense):
    return alds.distill(alds.compress(dense, params=0.6), dense, data(), epochs=4, lr=1e-2)[0]


def refined(dense):
    return alds.refine(alds.compress(dense, params=0.6), dense, data(), epochs=4, lr=1e-2)[0]


def refitted(dense):
    return alds.analyze(dense).plan(params=0.6).apply(dense, refit=data())


@pytest.mark.parametrize("made", [distilled, refined, refitted])
def test_what_is_fitted_is_what_it_is_without_the_cache(made):
    models = []
    for cached in (True, False):
        with torch.autocast("cpu", dtype=torch.bfloat16, cache_enabled=cached):
            models.append(made(encoder()).state_dict())
    before = alds.compress(encoder(), params=0.6).state_dict()
    assert not all(torch.equal(value, before[name]) for name, value in models[0].items())
    for name, value in models[1].items():
        assert torch.equal(models[0][name], value), name


def test_moments_are_not_summed_up_in_bfloat16():
    """What autocast does to a layer is seen of its inputs; it does not change how they are added up."""
    model, batches = nn.Sequential(nn.Linear(48, 8)), [torch.randn(64, 48) for _ in range(3)]
    plain = alds.analyze(model, data=batches)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = alds.analyze(model, data=batches)
    for one, other in zip(plain.moments.values(), cast.moments.values(), strict=True):
        assert torch.equal(one.second, other.second) and torch.equal(one.mean, other.mean) and one.noise == other.noise
