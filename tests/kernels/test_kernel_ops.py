"""The fused kernels as torch operators: gradients, tracing, compilation, export, FLOPs, autocast, training."""

import copy

import pytest
import torch
from support.kernel_cases import DEVICE, by_one, conv_case, linear_case, pivoted_case, ran, random
from support.marks import slow
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import alds_fast as alds
from alds_fast.errors import ArgumentError, BackendError
from alds_fast.kernels import lowrank_conv2d, lowrank_linear, lowrank_linears, op_linear, op_shared, pivot_table

CONV = {
    "encode": (conv_case(2, 8, (5, 6), 2, 3, 12, by_one(3, 3)), {"groups": 2, "padding": 1, "stride": 2}),
    "rows": (conv_case(1, 16, (6, 6), 1, 16, 16, by_one(3, 3)), {"padding": 2, "dilation": 2}),
}


@pytest.fixture(autouse=True)
def fresh_dynamo():
    torch._dynamo.reset()


def gradients(call, tensors, options, backend):
    leaves = {k: None if t is None else t.detach().clone().requires_grad_() for k, t in tensors.items()}
    y = call(**leaves, **options, backend=backend)
    weights = random(*y.shape, seed=9)
    (y * weights).sum().backward()
    return {k: t.grad for k, t in leaves.items() if t is not None}


def check_gradients(call, tensors, options):
    fused, plain = (gradients(call, tensors, options, b) for b in ("fused", "two-op"))
    for name in plain:
        torch.testing.assert_close(fused[name], plain[name], rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize("activation", [None, "relu", "silu", "gelu"])
@pytest.mark.parametrize("rows", [3, 20])
@pytest.mark.parametrize("extras", [True, False])
def test_gradients_of_linear(rows, activation, extras):
    case = linear_case(rows, 16, 2, 3, 8, bias=extras, residual=extras)
    check_gradients(lowrank_linear, case, {"groups": 2, "activation": activation})


@pytest.mark.parametrize("rows", [3, 20])
@pytest.mark.parametrize("extras", [True, False])
def test_gradients_with_output_pivots(rows, extras):
    case, order = pivoted_case(rows, 16, 5, 12, bias=extras, residual=extras)
    check_gradients(lowrank_linear, case, {"order": order, "activation": "gelu" if extras else None})


def test_a_table_of_pivots_that_changes_is_seen():
    case, order = pivoted_case(4, 16, 5, 12)
    lowrank_linear(**case, order=order, backend="fused")
    order.copy_(order.flip(0))
    after = [lowrank_linear(**case, order=order, backend=backend) for backend in ("fused", "two-op")]
    torch.testing.assert_close(*after)
    with torch.inference_mode():
        table = order.clone()
        after.append(lowrank_linear(**case, order=table, backend="fused"))
    torch.testing.assert_close(after[2], after[1])
    known = len(pivot_table._known)
    del order
    assert len(pivot_table._known) == known - 1


@pytest.mark.parametrize("activation", [slow(None), slow("relu"), slow("silu"), "gelu"])
@pytest.mark.parametrize("kind", list(CONV))
def test_gradients_of_conv2d(kind, activation):
    case, options = CONV[kind]
    shape = lowrank_conv2d(**case, **options, backend="two-op").shape
    check_gradients(lowrank_conv2d, {**case, "residual": random(*shape)}, {**options, "activation": activation})
    check_gradients(lowrank_conv2d, {**case, "bias": None}, {**options, "activation": activation})


def test_gradients_of_linears():
    x, encoder = random(2, 3, 16), random(9, 16)
    decoders, biases = [random(8, 4), random(5, 5)], [None, random(5)]
    grads = []
    for backend in ("fused", "two-op"):
        leaves = [t.detach().clone().requires_grad_() for t in (x, encoder, *decoders, biases[1])]
        ys = lowrank_linears(leaves[0], leaves[1], leaves[2:4], [None, leaves[4]], backend=backend)
        sum((y * random(*y.shape, seed=3)).sum() for y in ys).backward()
        grads.append([t.grad for t in leaves])
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


class Counted(TorchDispatchMode):
    """The operators of this library that are called inside."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen = [*getattr(self, "seen", []), *([func.__name__] if func.namespace == "alds_fast" else [])]
        return func(*args, **(kwargs or {}))


class Subclass(torch.Tensor):
    """A tensor of a type of its own."""


def test_the_dispatcher_is_asked_where_somebody_listens():
    case = linear_case(2, 16, 2, 3, 8)
    args = *case.values(), 2, None, None
    with Counted() as mode:
        lowrank_linear(**case, groups=2, backend="fused")
    assert mode.seen == ["lowrank_linear.default"]
    graded = {**case, "encoder": case["encoder"].clone().requires_grad_()}
    assert lowrank_linear(**graded, groups=2, backend="fused").grad_fn is not None
    with torch.no_grad():
        assert op_shared._is_plain_call((*graded.values(), 2, None))
    assert op_shared._is_plain_call(args) and not op_shared._is_plain_call(tuple(graded.values()))
    assert not op_shared._is_plain_call((case["x"].as_subclass(Subclass),))
    assert not op_shared._is_plain_call((case["x"], [graded["encoder"]]))
    with Counted():
        assert not op_shared._is_plain_call(args)
    encoders = torch.stack([case["encoder"], 2 * case["encoder"]])  # a transform of which x tells nothing
    both = torch.vmap(lambda e: lowrank_linear(**{**case, "encoder": e}, groups=2, backend="fused"))(encoders)
    each = [lowrank_linear(**{**case, "encoder": e}, groups=2, backend="fused") for e in encoders]
    torch.testing.assert_close(both, torch.stack(each))
    with torch.profiler.profile() as profile:
        lowrank_linear(**case, groups=2, backend="fused")
    assert "alds_fast::lowrank_linear" in [event.name for event in profile.events()]
    traced = torch.jit.trace(lambda x: op_linear.lowrank_linear_op(x, *args[1:]), case["x"])
    assert "alds_fast::lowrank_linear" in str(traced.graph)


@pytest.mark.slow
def test_opcheck():
    case = {k: v.requires_grad_() for k, v in linear_case(5, 16, 2, 3, 8).items()}
    torch.library.opcheck(torch.ops.alds_fast.lowrank_linear.default, (*case.values(), 2, "gelu"))
    case, order = pivoted_case(5, 16, 5, 12)
    pivoted = [t.requires_grad_() for t in case.values()]
    torch.library.opcheck(torch.ops.alds_fast.lowrank_linear.default, (*pivoted, 1, "gelu", order))
    tensors, _ = CONV["encode"]
    args = [t.detach().clone().requires_grad_() for t in tensors.values()]
    torch.library.opcheck(torch.ops.alds_fast.lowrank_conv2d.default, (*args, None, 2, [2, 2], [1, 1], [1, 1], "relu"))
    decoders = [random(8, 4).requires_grad_(), random(6, 5).requires_grad_()]
    merged = (random(3, 16).requires_grad_(), random(9, 16).requires_grad_(), decoders, [random(8)], [True, False], [])
    torch.library.opcheck(torch.ops.alds_fast.lowrank_linears.default, merged)


class Net(nn.Module):
    """Both kinds of layers, forced onto the fused kernels."""

    def __init__(self, backend="fused"):
        super().__init__()
        torch.manual_seed(0)
        self.conv = alds.LowRankConv2d(3, 8, 3, 4, padding=1, stride=2)
        self.down = alds.LowRankConv2d(8, 12, 3, 3, groups=2, padding=1)
        self.head = alds.LowRankLinear(12, 5, 3, groups=3)
        for layer in (self.conv, self.down, self.head):
            layer.backend = backend

    def forward(self, x):
        return self.head(self.down(torch.relu(self.conv(x))).mean((2, 3)))


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compile_without_graph_breaks(backend):
    net, x = Net().to(DEVICE).eval(), random(2, 3, 9, 9)
    compiled = torch.compile(net, fullgraph=True, backend=backend)
    torch.testing.assert_close(compiled(x), net(x), rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_compiled_training_step():
    plain, x = Net("two-op").to(DEVICE), random(2, 3, 9, 9)
    fused = Net().to(DEVICE)
    compiled = torch.compile(fused, fullgraph=True, backend="aot_eager")
    for net in (plain, compiled):
        net(x).square().sum().backward()
    for a, b in zip(plain.parameters(), fused.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_export_keeps_the_operators():
    net, x = Net().to(DEVICE).eval(), random(2, 3, 9, 9)
    program = torch.export.export(net, (x,))
    called = {str(node.target) for node in program.graph.nodes}
    assert {"alds_fast.lowrank_linear.default", "alds_fast.lowrank_conv2d.default"} <= called
    torch.testing.assert_close(program.module()(x), net(x))


@pytest.mark.slow
def test_dynamic_batch_size():
    net = torch.compile(Net().to(DEVICE).eval(), fullgraph=True, dynamic=True, backend="aot_eager")
    for n in (2, 3, 20):
        assert net(random(n, 3, 9, 9)).shape == (n, 5)


@pytest.mark.slow
def test_training_goes_down_on_every_backend():
    losses = {}
    for backend in ("fused", "two-op", "auto"):
        net, x = Net(backend).to(DEVICE), random(4, 3, 9, 9)
        optimizer = torch.optim.SGD(net.parameters(), lr=0.05)
        losses[backend] = []
        for _ in range(5):
            optimizer.zero_grad()
            loss = (net(x) - 1).square().mean()
            loss.backward()
            optimizer.step()
            losses[backend].append(loss.item())
        assert losses[backend][-1] < losses[backend][0]
    assert losses["fused"] == pytest.approx(losses["two-op"], rel=1e-4)


def test_double_backward():
    case = linear_case(3, 16, 2, 3, 8)
    seconds = []
    for backend in ("fused", "two-op"):
        x = case["x"].clone().requires_grad_()
        y = lowrank_linear(**{**case, "x": x}, groups=2, activation="silu", backend=backend).square().sum()
        (grad,) = torch.autograd.grad(y, x, create_graph=True)
        seconds.append(torch.autograd.grad(grad.square().sum(), x)[0])
    torch.testing.assert_close(*seconds, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("backend", ["fused", "two-op"])
def test_autocast(backend):
    net, x = Net(backend).to(DEVICE), random(2, 3, 9, 9)
    with torch.autocast(DEVICE, torch.float16 if DEVICE == "cuda" else torch.bfloat16):
        y = net(x)
    assert y.dtype in (torch.float16, torch.bfloat16)
    y.float().sum().backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in net.parameters())


def flops(call):
    with FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()


def test_flops_are_those_of_the_two_calls():
    case = linear_case(6, 16, 2, 3, 8)
    pivoted, order = pivoted_case(6, 16, 5, 12)
    calls = [lambda b: lowrank_linear(**case, groups=2, backend=b)]
    calls += [lambda b: lowrank_linear(**pivoted, order=order, backend=b)]
    calls += [lambda b, c=c, o=o: lowrank_conv2d(**c, **o, backend=b) for c, o in CONV.values()]
    calls += [lambda b: lowrank_linears(random(2, 16), random(7, 16), [random(8, 4), random(5, 3)], backend=b)]
    for call in calls:
        assert flops(lambda c=call: c("fused")) == flops(lambda c=call: c("two-op")) > 0


@pytest.mark.parametrize("mode", ["zeros", "reflect", "circular", "replicate"])
@pytest.mark.parametrize("scheme", [slow(0), 3])
def test_layers_equal_their_dense_form(scheme, mode):
    """Scheme 3 has no kernel: "fused-first" runs it as two calls."""
    torch.manual_seed(0)
    options = {"padding": "same" if mode != "zeros" else 2, "padding_mode": mode, "dilation": 1}
    layer = alds.LowRankConv2d(8, 12, (3, 2), 3, scheme=scheme, groups=2, **options).to(DEVICE)
    layer.backend, x = "fused" if scheme == 0 else "fused-first", random(2, 8, 7, 6)
    torch.testing.assert_close(layer(x), layer.to_dense()(x), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(layer(x[0]), layer(x)[0], rtol=1e-4, atol=1e-5)  # without a batch dimension


@pytest.mark.parametrize("backend", ["fused", "fused-first"])
def test_uneven_padding_reaches_the_kernel(backend):
    """What deploy measured as fused runs fused."""
    layer = alds.LowRankConv2d(8, 12, (3, 2), 3, padding="same").to(DEVICE)
    layer.backend, x = backend, random(2, 8, 7, 6)
    assert ran(lambda: layer(x)).count("alds_fast.lowrank_conv2d.default") == 1


def test_layers_that_have_no_kernel_say_so():
    x = random(1, 8, 6, 6)
    grouped = alds.LowRankConv2d(8, 8, 3, 2, conv_groups=2).to(DEVICE)
    split = alds.LowRankConv2d(8, 8, 3, 2, scheme=1).to(DEVICE)
    line = alds.LowRankConv1d(8, 8, 3, 2).to(DEVICE)
    cases = [(grouped, x, "grouped itself"), (split, x, "schemes 1 and 2 run as two calls")]
    for layer, data, reason in [*cases, (line, x[:, :, 0], "no kernel for 1-d")]:
        assert reason in layer.why_not_fused(data)
        layer.backend = "fused"
        with pytest.raises(BackendError, match=reason):
            layer(data)
        layer.backend = "two-op"
        assert layer(data).shape == layer.to_dense()(data).shape


def test_layers_take_input_by_name_and_refuse_wrong_channels():
    assert alds.LowRankLinear(16, 8, 2)(input=torch.ones(3, 16)).shape == (3, 8)
    assert alds.LowRankConv2d(4, 8, 3, 2)(input=torch.ones(1, 4, 5, 5)).shape == (1, 8, 3, 3)
    with pytest.raises(ArgumentError, match=r"x \(4, 2\) has 2 channels, expected 16"):
        alds.LowRankLinear(16, 8, 2, groups=2)(torch.randn(4, 2))


def test_deepcopy_and_state_dict_keep_working():
    net = Net().to(DEVICE)
    copied = copy.deepcopy(net)
    assert copied.head.backend == "fused" and "backend" not in "".join(net.state_dict())


@pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU")
def test_cuda_graph():
    net, x = Net().cuda().eval(), random(2, 3, 9, 9)
    with torch.no_grad():
        expected = net(x)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = net(x)
        graph.replay()
    torch.testing.assert_close(y, expected)
