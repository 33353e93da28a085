"""Layers that are left out: the reason names cause and remedy, and the layers beside them are compressed."""

import pytest
import torch
from support.models import Wrapped
from torch import nn
from torch.nn.utils import prune

import alds_fast as alds
from alds_fast.errors import BudgetError, ModelError, WeightError
from alds_fast.layers import find_layers, low_rank_like, overlaps
from alds_fast.linalg import Decomposition


def pair(size=32):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(size, size), nn.ReLU(), nn.Linear(size, size))


def reasons(model, **options):
    return {layer.name: layer.reason for layer in find_layers(model, **options)}


def check_second_is_compressed(model, words):
    """The first layer is left out for a reason with these words, and stays what it is; the second is compressed."""
    assert words in reasons(model)["0"] and reasons(model)["2"] is None
    small = alds.compress(model, params=0.8)
    assert type(small[0]) is type(model[0]) and isinstance(small[2], alds.LowRankLinear)
    x = torch.randn(3, 32)
    torch.testing.assert_close(small[0](x), model[0](x))
    return small


def test_a_weight_without_memory_of_its_own_is_left_out():
    model = pair()
    model[0].weight = nn.Parameter(Wrapped(model[0].weight.data))
    small = check_second_is_compressed(model, "its weight is a Wrapped, not a plain tensor")
    assert isinstance(small[0].weight, Wrapped) and small[0].weight.inner is not model[0].weight.inner
    alds.compress(model, params=0.8, exclude="0")
    with pytest.raises(BudgetError, match=r"params=0\.5 cannot be met.*no layer can be decomposed.*is a Wrapped"):
        alds.compress(nn.Sequential(model[0]), params=0.5)


def test_overlaps_pass_tensors_without_plain_memory_by():
    base = torch.zeros(8)
    nested = torch.nested.nested_tensor([torch.ones(2), torch.ones(3)])
    lazy = nn.LazyBatchNorm1d().running_mean
    several = [base, base[2:], Wrapped(base), nested, torch.eye(3).to_sparse(), torch.empty(3, device="meta"), lazy]
    assert overlaps({id(t): t for t in several}) == [(id(several[0]), id(several[1]))]


def test_layers_quantised_by_torchao():
    quantization = pytest.importorskip("torchao.quantization")
    model = pair()
    quantization.quantize_(model, quantization.Int8WeightOnlyConfig(), filter_fn=lambda module, name: name == "0")
    check_second_is_compressed(model, "of torchao; compress first, then quantise")


def test_fake_tensors():
    with torch._subclasses.FakeTensorMode():
        model = pair()
    with pytest.raises(BudgetError, match="its weight is a FakeTensor, which holds no numbers"):
        alds.compress(model, params=0.5)


@pytest.fixture
def one_process():
    from torch.testing._internal.distributed.fake_pg import FakeStore  # registers the backend "fake"

    torch.distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=1)
    yield torch.distributed.device_mesh.init_device_mesh("cpu", (1,))
    torch.distributed.destroy_process_group()


def test_distributed_tensors_and_fully_sharded_modules(one_process):
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import Shard, distribute_tensor

    model = pair()
    for name in ("weight", "bias"):
        whole = getattr(model[0], name).data
        setattr(model[0], name, nn.Parameter(distribute_tensor(whole, one_process, [Shard(0)])))
    assert "DTensor, sharded over processes: gathered weights are needed" in reasons(model)["0"]
    small = alds.compress(model, params=0.8)
    assert isinstance(small[2], alds.LowRankLinear) and type(small[0].weight) is type(model[0].weight)
    with pytest.raises(WeightError, match=r"'0' is sharded by FSDP; load a full state dict .*model\.module"):
        alds.compress(nn.Sequential(fully_shard(nn.Linear(8, 8), mesh=one_process)), params=0.5)


def sharded(layer, how):
    """The layer as sharded training leaves it between steps."""
    whole = layer.weight.data
    if how == "empty":
        layer.weight, layer.bias = nn.Parameter(torch.empty(0)), nn.Parameter(torch.empty(0))
    elif how == "flat":
        layer.weight = nn.Parameter(whole.flatten()[: whole.numel() // 2].clone())
    else:  # FSDP with use_orig_params=False: a tensor, and no parameter
        del layer.weight
        layer.weight = whole
    return layer


def test_a_sharded_weight_comes_before_the_hooks_of_what_sharded_it():
    layer = sharded(nn.Linear(32, 32), "empty")
    layer.register_forward_pre_hook(lambda *a: None)
    assert "gathered weights are needed" in reasons(layer)[""]


@pytest.mark.parametrize("how", ["empty", "flat", "no parameter"])
@pytest.mark.parametrize("layer", [lambda: nn.Linear(32, 32), lambda: nn.Conv2d(32, 32, 3)], ids=["linear", "conv"])
def test_sharded_weights_are_to_be_gathered(how, layer):
    words = {"empty": "its weight is empty", "flat": "its weight is flat", "no parameter": "its weight is not a param"}
    model = nn.Sequential(sharded(layer(), how), nn.ReLU(), nn.Linear(32, 32))
    reason = reasons(model)["0"]
    assert words[how] in reason and "GatheredParameters" in reason and "summon_full_params" in reason
    assert isinstance(alds.compress(model, params=0.9, groups=(1,))[2], alds.LowRankLinear)
    alone = nn.Sequential(nn.Embedding(5, 4), sharded(layer(), how))
    for options in ({"params": 0.5}, {"error": 0.5}, {"params": 1.0}):
        with pytest.raises(WeightError, match=f"no layer of the model can be decomposed: .*{words[how]}.*gathered"):
            alds.compress(alone, **options)


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
def test_a_layer_that_has_no_weights_by_its_settings_is_not_sharded():
    assert reasons(nn.Linear(0, 4))[""] == "its weight is empty"


@pytest.mark.parametrize(
    ("change", "words", "undo"),
    [
        (lambda m: prune.l1_unstructured(m, "weight", 0.5), "pruning mask", lambda m: prune.remove(m, "weight")),
        (lambda m: prune.random_unstructured(m, "bias", 0.5), "pruning mask", lambda m: prune.remove(m, "bias")),
        (lambda m: nn.utils.spectral_norm(m), "remove_spectral_norm", nn.utils.remove_spectral_norm),
        (
            lambda m: nn.utils.parametrizations.spectral_norm(m),
            "remove_parametrizations(layer, 'weight')",
            lambda m: nn.utils.parametrize.remove_parametrizations(m, "weight"),
        ),
    ],
    ids=["prune", "prune bias", "spectral_norm", "parametrization"],
)
def test_weights_that_are_computed_are_left_out_and_copied(change, words, undo):
    model = pair().eval()
    change(model[0])
    model(torch.ones(1, 32))  # weights under masks and norms stand in a graph from here on
    small = check_second_is_compressed(model, words)
    copied = next(small[0].parameters())
    with torch.no_grad():
        copied.zero_()
    assert not torch.equal(copied, next(model[0].parameters()))
    undo(model[0])
    assert reasons(model)["0"] is None  # the remedy is one


class Head(nn.Linear):
    """For isinstance checks."""


class Sized(nn.Linear):
    """With arguments of its own, another initialisation and a method of its own."""

    def __init__(self, size, gain=2.0):
        super().__init__(size, size)
        self.gain = gain

    def reset_parameters(self):
        nn.init.orthogonal_(self.weight)
        nn.init.zeros_(self.bias)

    def extra_repr(self):
        return "sized"

    def init_weights(self):
        self.reset_parameters()


class Depthwise(nn.Conv2d):
    def __init__(self, channels):
        super().__init__(channels, channels, 3, padding=1, groups=channels)


@pytest.mark.parametrize(
    ("layer", "x"),
    [
        (lambda: Head(32, 32), torch.randn(3, 32)),
        (lambda: Sized(32), torch.randn(3, 32)),
        (lambda: Depthwise(4), torch.randn(2, 4, 6, 6)),
        (lambda: nn.modules.linear.NonDynamicallyQuantizableLinear(32, 32), torch.randn(3, 32)),
    ],
    ids=["head", "sized", "depthwise", "of attention"],
)
def test_a_subclass_that_adds_nothing_to_forward_is_decomposed(layer, x):
    model = nn.Sequential(layer())
    assert reasons(model)["0"] is None
    small = alds.compress(model, error=1e-6)
    torch.testing.assert_close(small(x), model(x), rtol=1e-4, atol=1e-5)
    new = low_rank_like(model[0], Decomposition(0, 1, 1))
    assert isinstance(new, alds.LowRankLinear if x.dim() == 2 else alds.LowRankConv2d)


class _Doubled(nn.Linear):
    def __call__(self, *args):
        return 2 * super().__call__(*args)


class _Standardised(nn.Conv2d):
    def _conv_forward(self, x, weight, bias):
        return super()._conv_forward(x, weight - weight.mean(), bias)


class _Tracked(nn.Linear):
    def __getattr__(self, name):
        return super().__getattr__(name)


class _Halved(nn.Linear):
    @property
    def weight(self):
        if "weight" not in self._parameters:
            raise AttributeError("weight")
        return self._parameters["weight"] / 2


class _Saved(nn.Linear):
    def _save_to_state_dict(self, destination, prefix, keep_vars):
        destination[prefix + "kernel"] = self.weight.T


class _Through(Head):
    def forward(self, x):
        return super().forward(x).relu()


class _Masked(nn.Linear):
    def __init__(self, *sizes):
        super().__init__(*sizes)
        self.register_buffer("mask", torch.ones(sizes[1]))


@pytest.mark.parametrize(
    ("layer", "words"),
    [
        (lambda: _Doubled(8, 8), "a subclass with a forward of its own"),
        (lambda: _Standardised(2, 2, 3), "a subclass with a forward of its own"),
        (lambda: _Through(8, 8), "a subclass with a forward of its own"),
        (lambda: _Tracked(8, 8), "a subclass with __getattr__ of its own"),
        (lambda: _Halved(8, 8), "a subclass with weight of its own"),
        (lambda: _Saved(8, 8), "a subclass with _save_to_state_dict of its own"),
        (lambda: _Masked(8, 8), "parameters, buffers or modules beside weight and bias"),
    ],
)
def test_a_subclass_that_changes_something_is_left_out(layer, words):
    assert words in reasons(nn.Sequential(layer()))["0"]


def test_a_layer_that_two_modules_hold_is_looked_at_in_both():
    attention = nn.MultiheadAttention(8, 2)
    model = nn.ModuleList([attention, nn.Sequential(attention.out_proj)])
    assert (
        reasons(model)["0.out_proj"]
        == reasons(model[::-1])["0.0"]
        == ("nn.MultiheadAttention reads this weight directly")
    )


def test_scripted_and_exported_models():
    x = torch.ones(1, 32)
    for scripted in (torch.jit.script(pair()), torch.jit.trace(pair(), x)):
        with pytest.raises(ModelError, match=r"ScriptModule.*pass the torch\.nn\.Module that it was made from"):
            alds.compress(scripted, params=0.5)
    check_second_is_compressed(
        nn.Sequential(torch.jit.script(nn.Linear(32, 32)), nn.ReLU(), nn.Linear(32, 32)), "compiled by TorchScript"
    )
    program = torch.export.export(pair(), (x,))
    for exported in (program.module(), torch.export.unflatten(program)):
        with pytest.raises(BudgetError, match=r"params=0\.5 cannot be met.*compress the model before torch\.export"):
            alds.compress(exported, params=0.5)


def test_compiled_and_parallel_models_are_compressed_as_they_are():
    model, x = pair(), torch.randn(3, 32)
    for wrapped in (torch.compile(model, backend="eager"), nn.DataParallel(model)):
        small = alds.compress(wrapped, params=0.5)
        assert type(small) is type(wrapped) and sum(isinstance(m, alds.LowRankLinear) for m in small.modules()) == 2
        assert not torch.allclose(small(x), model(x))


def test_hooks_of_accelerate():
    hooks = pytest.importorskip("accelerate.hooks")
    model = pair()
    hooks.add_hook_to_module(model[0], hooks.AlignDevicesHook(execution_device="cpu"))
    check_second_is_compressed(model, "accelerate moves its weight about (device_map=, offload)")
    hooks.remove_hook_from_module(model, recurse=True)
    assert reasons(model)["0"] is None
    accelerate = pytest.importorskip("accelerate")
    offloaded = accelerate.cpu_offload(pair(), execution_device="cpu")
    with pytest.raises(BudgetError, match=r"accelerate moves its weight about.*without device_map="):
        alds.compress(offloaded, params=0.5)


@pytest.mark.parametrize("budget", [{"params": 0.5}, {"flops": 0.5}, {"latency": 0.5}])
def test_a_budget_that_nothing_can_meet_says_why(budget):
    model = nn.Sequential(nn.Embedding(5, 32), *(nn.utils.parametrizations.orthogonal(m) for m in (nn.Linear(32, 32),)))
    example = {} if "params" in budget else {"example_inputs": torch.tensor([[1, 2]])}
    with pytest.raises(BudgetError, match=r"cannot be met.*no layer can be decomposed.*its weight is parametrized"):
        alds.compress(model, **budget, **example)


def test_an_error_that_nothing_can_be_done_under_is_a_warning():
    with pytest.warns(UserWarning, match="no layer can be decomposed: the model itself: a table of which rows"):
        alds.compress(nn.Embedding(5, 4), error=0.5)


@pytest.mark.parametrize("freed", ["weight", "bias"])
def test_freed_memory_is_to_be_gathered(freed):
    """As FSDP leaves it between steps."""
    model = nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 32))
    getattr(model[0], freed).untyped_storage().resize_(0)
    with pytest.raises(WeightError, match=f"'0': the memory of its {freed} is freed: gathered weights are needed"):
        alds.compress(model, params=0.6)
    for parameter in model.parameters():
        parameter.untyped_storage().resize_(0)
    with pytest.raises(WeightError, match="the memory of its weight is freed"):
        alds.compress(model, params=0.6)


def test_some_layers_left_out_are_named_by_a_budget_that_cannot_be_met():
    model = nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 32))
    model[1].register_forward_hook(lambda *a: None)
    with pytest.raises(BudgetError, match=r"cannot be met.*; left out: '1': it has hooks"):
        alds.compress(model, params=0.1)


def test_compiled_layers_are_decomposed_and_closures_of_compiled_models_not_warned_of(recwarn):
    model = nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 32))
    model.compile(backend="eager")
    model[1].compile(backend="eager")
    assert [row.rank is None for row in alds.compress(model, params=0.6).alds_plan.layers] == [False, False]
    assert not [w for w in recwarn if "holds" in str(w.message)]


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:torch.quantize_per_tensor")
def test_layers_quantised_by_torch():
    model = torch.ao.quantization.quantize_dynamic(nn.Sequential(nn.Linear(32, 32), nn.ReLU()), {nn.Linear})
    words = "'0': Linear is quantised by torch.ao; compress first, then quantise alds_fast.to_plain"
    with pytest.warns(UserWarning, match=f"no layer can be decomposed: {words}"):
        alds.compress(model, params=0.5)
    assert "quantised by torch.ao" in reasons(nn.Sequential(model, nn.Linear(32, 32)))["0.0"]


def test_subclasses_and_hooks_of_low_rank_layers():
    small = alds.compress(nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 32)), params=0.6)
    small[0].register_forward_hook(lambda *a: None)
    small[1].__class__ = type("Own", (alds.LowRankLinear,), {})
    with pytest.raises(BudgetError, match=r"'0': it has hooks.*; '1': Own is a subclass of a low-rank layer"):
        alds.compress(small, params=0.5)


def test_weights_that_peft_adapts_itself():
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=4, target_modules=[], target_parameters=["0.weight"])
    model = peft.get_peft_model(nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 32)), config).eval()
    small, x = alds.compress(model, params=0.8, groups=(1,)), torch.randn(2, 32)
    why = {row.name.rsplit("model.", 1)[-1]: row.reason for row in small.alds_plan.layers}
    assert "target_parameters" in why["0.base_layer"] and why["1"] is None
    assert small(x).shape == model(x).shape


@pytest.mark.parametrize("bias", [torch.empty(32, device="meta"), torch.empty(0)])
def test_a_bias_that_is_not_there(bias):
    model = nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 32))
    model[1].bias = nn.Parameter(bias)
    assert "its bias, " in reasons(model)["1"] and "gathered weights" in reasons(model)["1"]
