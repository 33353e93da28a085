"""What is collected on data: patches against unfold, second moments and gradients by hand, masks, memory, errors."""

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import alds_fast as alds
from alds_fast.criteria import collect_moments, outputs, patches
from alds_fast.errors import ArgumentError, ModelError
from alds_fast.layers import find_layers

CONVS = [
    (nn.Conv1d(4, 6, 3, stride=2, padding=1), (2, 4, 9)),
    (nn.Conv1d(4, 6, 2, padding="same"), (2, 4, 9)),
    (nn.Conv2d(4, 6, (3, 2), padding=(1, 2), dilation=2), (2, 4, 8, 9)),
    (nn.Conv2d(4, 6, 3, groups=2, padding=1, padding_mode="circular"), (2, 4, 6, 7)),
    (nn.Conv2d(4, 4, 3, groups=4, padding=1, padding_mode="reflect"), (4, 6, 7)),
    (nn.Conv3d(2, 3, 2, padding=1, padding_mode="replicate"), (2, 2, 4, 5, 3)),
]


def layers_of(model):
    return [layer for layer in find_layers(model) if layer.reason is None]


@pytest.mark.parametrize(("module", "shape"), CONVS, ids=lambda v: str(v)[:40])
def test_weight_times_patches_is_the_output(module, shape):
    module, x = module.double(), torch.randn(shape, dtype=torch.float64)
    rows, count = patches(module, x)
    weight = module.weight.flatten(1).unflatten(0, (module.groups, -1))
    product = torch.einsum("rgn,gfn->rgf", rows, weight) + module.bias.view(module.groups, -1)
    expected, same = outputs(module, module(x))
    assert count == same == len(rows)
    torch.testing.assert_close(product, expected, rtol=1e-12, atol=1e-12)


def test_linear_rows_are_the_tokens_kept():
    x = torch.arange(12.0).view(2, 3, 2)
    keep = torch.tensor([[True, False, True], [False, True, False]])
    rows, count = patches(nn.Linear(2, 5), x, keep)
    assert count == 3 and rows[:, 0].tolist() == [[0, 1], [4, 5], [8, 9]]
    assert patches(nn.Linear(2, 5), x[0, 0])[0].shape == (1, 1, 2)


def test_a_share_of_the_patches_is_drawn_from_all_of_them():
    module, x = nn.Conv1d(1, 1, 1), torch.arange(1000.0).view(1, 1, -1)
    rows, count = patches(module, x, wanted=lambda n: n // 4, seed=3)
    assert count == 1000 and len(rows) == 250
    assert 350 < float(rows.mean()) < 650 and len(rows.unique()) > 200
    assert not torch.equal(rows, patches(module, x, wanted=lambda n: n // 4, seed=4)[0])
    assert len(patches(module, x, wanted=lambda n: 0)[0]) == 1


def test_moments_are_those_of_all_tokens_in_float64():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3))
    batches = [torch.randn(7, 5), torch.randn(3, 2, 5)]
    moments = collect_moments(model, batches, layers_of(model))
    x = torch.cat([b.flatten(0, -2) for b in batches]).double()
    assert moments["0"].rows == 13 and moments["0"].second.dtype == torch.float64 and moments["0"].gradient is None
    torch.testing.assert_close(moments["0"].second[0], x.mT @ x / 13, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(moments["0"].mean[0], x.mean(0), rtol=1e-6, atol=1e-6)
    hidden = torch.tanh(model[0](x.float())).double()
    torch.testing.assert_close(moments["2"].second[0], hidden.mT @ hidden / 13, rtol=1e-6, atol=1e-6)


def test_padded_tokens_do_not_count():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(3, 4), nn.Linear(4, 2)

        def forward(self, x, attention_mask):
            return self.second(self.first(x).relu())

    model, x = Model(), torch.randn(2, 4, 3)
    mask = torch.tensor([[1, 1, 1, 0], [1, 0, 0, 0]])
    batch = {"x": x.masked_fill(mask[..., None] == 0, 1e6), "attention_mask": mask}
    moments = collect_moments(model, [batch], layers_of(model))
    real = x[mask.bool()].double()
    torch.testing.assert_close(moments["first"].second[0], real.mT @ real / 4, rtol=1e-6, atol=1e-6)
    assert moments["first"].rows == moments["second"].rows == 4
    assert collect_moments(model, [batch], layers_of(model), mask=None)["first"].rows == 8


def test_layers_with_one_input_share_its_moment():
    class Heads(nn.Module):
        def __init__(self):
            super().__init__()
            self.q, self.k, self.v = (nn.Linear(4, 4) for _ in range(3))

        def forward(self, x):
            return self.q(x) + self.k(x) + self.v(x * 2)

    model, x = Heads(), torch.randn(6, 4)
    moments = collect_moments(model, [x, x + 1], layers_of(model))
    assert moments["q"].second is moments["k"].second and moments["v"].second is not moments["q"].second
    torch.testing.assert_close(moments["v"].second, 4 * moments["q"].second)


def test_an_input_changed_in_place_is_another_input():
    class InPlace(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(3, 3), nn.Linear(3, 3)

        def forward(self, x):
            y = self.a(x)
            return y + self.b(x.mul_(2))

    model, x = InPlace(), torch.randn(5, 3)
    moments = collect_moments(model, [x.clone()], layers_of(model))
    torch.testing.assert_close(moments["b"].second, 4 * moments["a"].second)


def test_gradients_are_those_along_random_signs():
    """y = W x is the output itself: its gradient along signs is the signs, so E[g g^T] has ones on its diagonal."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4))
    x = torch.randn(500, 3)
    moments = collect_moments(model, [x], layers_of(model), sensitivity=True)["0"]
    energy = float(model(x).detach().double().square().sum())
    torch.testing.assert_close(
        moments.gradient[0].diagonal(), torch.full((4,), 500 / energy).double(), rtol=1e-4, atol=0
    )
    off = moments.gradient[0] - torch.diag(moments.gradient[0].diagonal())
    assert float(off.abs().max()) < 0.25 * 500 / energy


def test_gradients_of_a_loss_by_hand():
    model, x = nn.Sequential(nn.Linear(2, 2, bias=False)), torch.tensor([[1.0, 0.0], [0.0, 2.0]])
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[1.0, 2.0], [3.0, 4.0]]))
    moments = collect_moments(model, [x], layers_of(model), sensitivity=lambda y, batch: (y**2).sum() / 2)["0"]
    y = x @ model[0].weight.detach().T  # the gradient of the loss
    torch.testing.assert_close(moments.gradient[0], (y.mT @ y).double())


def test_sensitivity_of_the_tensor_that_a_function_returns():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 3), nn.ReLU(inplace=True), nn.Linear(3, 2))
    seen = []

    def first_only(output, batch):
        seen.append(batch)
        return output[:, :1]

    x = torch.randn(20, 4)
    moments = collect_moments(model, [x], layers_of(model), sensitivity=first_only)
    assert torch.equal(seen[0], x) and seen[0] is not x
    assert float(moments["2"].gradient[0, 1, 1]) == 0.0 and float(moments["2"].gradient[0, 0, 0]) > 0
    assert all(p.requires_grad and p.grad is None for p in model.parameters())


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed_layers_count_once(reentrant):
    class Model(nn.Module):
        def __init__(self, saving):
            super().__init__()
            self.first, self.second, self.saving = nn.Linear(3, 4), nn.Linear(4, 2), saving

        def forward(self, x):
            h = self.first(x)
            return checkpoint(self.second, h, use_reentrant=reentrant) if self.saving else self.second(h)

    saving, x = Model(True), torch.randn(9, 3)
    plain = Model(False)
    plain.load_state_dict(saving.state_dict())
    moments, wanted = (collect_moments(m, [x], layers_of(m), sensitivity=True) for m in (saving, plain))
    for name in ("first", "second"):
        assert moments[name].rows == 9
        torch.testing.assert_close(moments[name].second, wanted[name].second)
        torch.testing.assert_close(moments[name].gradient, wanted[name].gradient)


def test_no_gradients_are_left_on_the_data():
    model, x = nn.Sequential(nn.Linear(3, 4)), torch.randn(9, 3, requires_grad=True)
    collect_moments(model, [(x,)], layers_of(model), sensitivity=True)
    assert x.grad is None and x.requires_grad


def test_a_layer_above_the_limit_gets_the_moment_of_its_output():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(36, 2))
    x = torch.randn(5, 3, 3, 3)
    moments = collect_moments(model, [x], layers_of(model), order=30)
    assert moments["0"].second is not None and moments["3"].second is None
    z = (model[:3](x) @ model[3].weight.T).double()
    torch.testing.assert_close(moments["3"].output[0], z.mT @ z / 5, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(moments["3"].mean[0], z.mean(0), rtol=1e-5, atol=1e-6)


def test_the_model_is_left_as_it_was():
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Dropout(), nn.Flatten(), nn.Linear(16, 2)).train()
    model[0].weight.requires_grad_(False)
    before = {n: v.clone() for n, v in model.state_dict().items()}
    state, x = torch.random.get_rng_state(), torch.ones(8, 1, 4, 4)
    alds.analyze(model, data=[x], sensitivity=True)
    assert torch.equal(state, torch.random.get_rng_state())
    assert all(torch.equal(v, model.state_dict()[n]) for n, v in before.items())
    assert model.training and not model[0].weight.requires_grad and model[4].weight.requires_grad
    assert not any(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


@pytest.mark.parametrize(
    ("data", "error", "message"),
    [
        ([], ArgumentError, "data= has no batches"),
        (torch.zeros(1, 3), ArgumentError, r"data is a Tensor: .* for example \[x\]"),
        (7, ArgumentError, "data is a int"),
        (["text"], ArgumentError, "str"),
        ([torch.zeros(1, 5)], ModelError, "batch 1 of data= did not run through the model"),
        (
            [torch.zeros(1, 3), torch.zeros(1, 5)],
            ModelError,
            r"batch 2 .* without labels; of pairs \(x, y\) pass \[x",
        ),
        ([torch.full((1, 3), torch.nan)], ModelError, "layer '0': its input has NaN or infinite values"),
    ],
)
def test_refusals(data, error, message):
    with pytest.raises(error, match=message):
        alds.analyze(nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)), data=data)


def test_layers_under_no_grad_get_no_gradient():
    class Frozen(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(3, 4), nn.Linear(4, 2)

        def forward(self, x):
            with torch.no_grad():
                h = self.a(x)
            return self.b(h)

    moments = alds.analyze(Frozen(), data=[torch.randn(8, 3)], sensitivity=True).moments
    assert not moments["a"].gradient.any() and moments["b"].gradient.any()


def test_sensitivity_is_refused_in_inference_mode():
    with torch.inference_mode(), pytest.raises(ArgumentError, match="inference_mode.. forbids: call it outside"):
        alds.analyze(nn.Sequential(nn.Linear(3, 4)), data=[torch.zeros(1, 3)], sensitivity=True)


def test_sensitivity_needs_an_output_with_a_gradient():
    class Detached(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(3, 4)

        def forward(self, x):
            return self.layer(x).argmax(-1)

    with pytest.raises(ModelError, match="sensitivity= needs a floating-point output"):
        alds.analyze(Detached(), data=[torch.randn(2, 3)], sensitivity=True)


def test_batches_of_one_image():
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 10))
    images = torch.randn(16, 3, 8, 8)
    one, all_together = (alds.analyze(net, data=data, held_out=0) for data in (list(images.split(1)), [images]))
    assert one.moments["3"].rows == all_together.moments["3"].rows == 16
    torch.testing.assert_close(one.moments["3"].second, all_together.moments["3"].second)
    assert alds.compress(net, params=0.5, data=list(images.split(1)), refit=True)(images).isfinite().all()


def test_nan_in_samples_kept_aside_is_named():
    batches = [torch.randn(16, 24) for _ in range(8)]
    batches[7][-1] = torch.nan
    with pytest.raises(ModelError, match="layer '0': its input has NaN or infinite values"):
        alds.analyze(nn.Sequential(nn.Linear(24, 24)), data=batches)


def test_a_layer_that_passes_no_gradient_on():
    class Stops(nn.Module):
        def forward(self, x):
            return x.detach()

    net = nn.Sequential(nn.Linear(24, 24), Stops(), nn.Linear(24, 24))
    moments = alds.analyze(net, data=[torch.randn(16, 24) for _ in range(2)], sensitivity=True).moments
    assert moments["2"].gradient.any() and not moments["0"].gradient.any()
