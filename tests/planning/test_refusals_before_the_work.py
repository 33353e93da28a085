"""What is refused before the work with its cause, and runs that leave the user's model as it is."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

import alds_fast as alds
from alds_fast.errors import ArgumentError, LayerNotFoundError, ModelError, WeightError
from alds_fast.planning.result_check import warn_if_apart


def net(*sizes):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(24, 32), nn.ReLU(), nn.Linear(32, 24)).eval()


DATA = [torch.randn(8, 24, generator=torch.Generator().manual_seed(i)) for i in range(3)]


class Watched(nn.Module):
    """Fails the test if it is run."""

    def __init__(self):
        super().__init__()
        self.a = nn.Linear(24, 24)

    def forward(self, x):
        raise AssertionError("it was run")


@pytest.mark.parametrize(
    "options, error, message",
    [
        ({"importance": {"nope": 2.0}}, LayerNotFoundError, "importance='nope' matches no layer"),
        ({"importance": {"a": float("nan")}}, ArgumentError, r"importance\['a'\]=nan is outside"),
        ({"criterion": "sensitivity"}, ArgumentError, "criterion='sensitivity' needs gradients"),
        ({"sensitivity": "loss"}, ArgumentError, "sensitivity='loss' is neither True or False nor 'kl'"),
        ({"held_out": 2}, ArgumentError, r"held_out=2 is outside \[0, 1\)"),
        ({"moment_memory": 0}, ArgumentError, "moment_memory=0 is not a number of bytes"),
    ],
)
def test_options_are_checked_before_anything_runs(options, error, message):
    with pytest.raises(error, match=message):
        alds.compress(Watched(), params=0.5, data=DATA, **options)


def test_a_function_of_sensitivity_that_fails_is_named():
    with pytest.raises(ModelError, match=r"sensitivity= raised AttributeError: .* called with \(output, batch\)"):
        alds.analyze(net(), data=DATA, sensitivity=lambda output, batch: output.logits)


def test_parameters_that_allow_no_gradients_are_named():
    with torch.inference_mode():
        model = net()
    with pytest.raises(ArgumentError, match="parameter '0.weight' was made in torch.inference_mode()"):
        alds.analyze(model, data=DATA, sensitivity=True)
    assert alds.compress(model, params=0.6, data=DATA).alds_plan.criterion


def test_sharded_models_are_refused_before_they_run():
    from torch.distributed.fsdp import fully_shard
    from torch.testing._internal.distributed.fake_pg import FakeStore

    torch.distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=1)
    try:
        mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (1,))
        model = nn.Sequential(Watched())
        model.append(fully_shard(nn.Linear(24, 24), mesh=mesh))
        for call in (alds.compress, lambda m, params, **o: alds.analyze(m, **o)):
            with pytest.raises(WeightError, match=r"'1' is sharded by FSDP; load a full state dict .*model\.module"):
                call(model, params=0.5, data=DATA, sensitivity=True)
    finally:
        torch.distributed.destroy_process_group()


def test_large_embeddings_that_are_renormalised_are_put_back():
    class Renormalised(nn.Module):
        def __init__(self):
            super().__init__()
            self.e, self.a = nn.Embedding(70_000, 24, max_norm=1.0), nn.Linear(24, 24)

        def forward(self, i):
            return self.a(self.e(i))

    model = Renormalised().eval()
    before = model.e.weight.detach().clone()
    alds.compress(model, params=0.9999, data=[torch.randint(70_000, (16,)) for _ in range(3)])
    assert torch.equal(model.e.weight, before)


def test_a_bias_that_the_forward_reads_is_left_as_it_is():
    class Autoencoder(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.encoder, self.decoder = nn.Linear(24, 64), nn.Linear(64, 24)

        def forward(self, x):
            return self.decoder(self.encoder(x - self.decoder.bias).relu())

    model = Autoencoder().eval()
    small = alds.compress(model, params=0.5, data=[x + 3 for x in DATA])
    assert torch.equal(small.decoder.bias, model.decoder.bias)
    assert not torch.equal(small.encoder.bias, model.encoder.bias)


def test_a_forward_that_asks_for_types_is_said_without_inputs(recwarn):
    class Asks(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(24, 24), nn.Linear(24, 24)

        def forward(self, x):
            for m in self.children():
                if isinstance(m, nn.Linear):
                    x = m(x).relu()
            return x

    with pytest.warns(UserWarning, match="the forward of Asks asks whether something is one of torch's layers"):
        alds.compress(Asks(), params=0.6)
    recwarn.clear()
    with pytest.raises(ModelError, match="asks for the type of a layer"):
        alds.compress(Asks(), params=0.6, example_inputs=DATA[0])
    alds.compress(net(), params=0.6)
    assert not [w for w in recwarn if "asks whether" in str(w.message)]


def test_layers_within_transforms_of_functions_are_named():
    class Each(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Linear(24, 24)

        def forward(self, x):
            return torch.func.vmap(self.a)(x)

    with pytest.raises(ModelError, match="layer 'a' runs within torch.func.vmap or grad"):
        alds.analyze(Each().eval(), data=DATA)
    assert alds.compress(Each().eval(), params=0.6)(DATA[0]).shape == (8, 24)


def test_pca_of_many_outputs_is_as_small_as_their_inputs():
    model = nn.Sequential(nn.Linear(16, 40_000)).eval()
    plan = alds.analyze(model, data=[torch.randn(64, 16) for _ in range(3)]).plan(params=0.5, method="pca")
    assert plan.layers[0].rank and plan.params <= 0.5 * plan.params_before


@pytest.mark.filterwarnings("error")
def test_errors_on_samples_kept_aside_are_warned_of_where_they_are_larger():
    row, times_ten = (
        SimpleNamespace(name="a", error=0.1, held_out=0.3),
        SimpleNamespace(name="a", error=1, held_out=0.3),
    )
    with pytest.raises(UserWarning, match=r"errors are 0\.3, larger than the 0\.1 stated .* pass more samples"):
        warn_if_apart([row], {})
    with pytest.raises(UserWarning, match=r"errors are 3, larger than the 1 stated"):
        warn_if_apart([times_ten], {"a": 10.0})  # importance= is a factor of the stated errors
    warn_if_apart([SimpleNamespace(name="a", error=0.000853, held_out=0.000457)], {})
    warn_if_apart([SimpleNamespace(name="a", error=0.01, held_out=0.1)], {"a": 0.1})
