"""deploy: which way of running a layer is kept, that the function stays the same, and the table."""

import copy
import json
import math
from dataclasses import replace

import pytest
import torch
from support.marks import slow
from support.models import images, small_net
from torch import nn

import alds_fast as alds
from alds_fast.deployment import DeployTable, autotune
from alds_fast.errors import ArgumentError, BackendError, FileFormatError, MissingFileError, ModelError
from alds_fast.kernels.fused import linear as linear_kernels
from alds_fast.layers import MergedLinears, MergedPart
from alds_fast.measurement.timing import timer

INTERPRETED = not torch.cuda.is_available()


def compressed(**options):
    return alds.compress(small_net(), **({"params": 0.6, "pivots": False} | options))


def fake_timer(monkeypatch, cost):
    """Times by the name of the side and the layer; every round a little different, all sides alike."""
    asked = []

    def interleaved_ms(calls, device, *, rounds):
        asked.append(list(calls))
        return {name: [cost(name) * (1 + 0.1 * i) for i in range(rounds)] for name in calls}

    for module in (autotune, timer):
        monkeypatch.setattr(module, "interleaved_ms", interleaved_ms)
    return asked


def by_backend(dense, two_op, fused, deployed=0.9):
    table = {"dense": dense, "two-op": two_op, "fused": fused, "deployed": deployed, "separate": two_op}
    return lambda name: table[name.split(",")[0]] * (1.5 if "," in name else 1.0)


@pytest.mark.parametrize(
    "times, won",
    [
        ((3.0, 2.0, 4.0), "two-op"), ((1.0, 2.0, 4.0), "dense"), ((3.0, 2.0, 1.5), "fused"),
        slow((2.0, 2.0, 2.0), "dense"), slow((2.0, 1.99, 1.97), "dense"), ((3.0, 2.0, 1.99), "two-op"),
    ],
)  # fmt: skip
@pytest.mark.skipif(not INTERPRETED, reason="schemes 1 and 2 and types differ there")
def test_the_fastest_is_kept_and_ties_go_to_the_simpler(monkeypatch, times, won):
    fake_timer(monkeypatch, by_backend(*times))
    small, x = compressed(schemes=(0,)), images()
    fast, table = alds.deploy(small, x, report=True)
    grouped = {
        name for name, m in small.named_modules() if getattr(getattr(m, "weight_shape", 0), "conv_groups", 1) > 1
    }
    for row in table.rows:
        expected = won if row.name not in grouped or won != "fused" else "two-op"
        assert row.won == expected, row
        module = fast.get_submodule(row.name)
        backend = "fused-first" if row.won == "fused" else row.won
        assert isinstance(module, nn.Linear | nn.Conv2d) if row.won == "dense" else module.backend == backend
    torch.testing.assert_close(fast(x), small(x), rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_reshaped_forms_can_win(monkeypatch):
    fake_timer(monkeypatch, lambda name: 0.5 if "groups=1" in name or name == "deployed" else 1.0)
    layer = alds.LowRankConv2d(32, 64, 3, 3, groups=4, padding=1)
    fast, table = alds.deploy(nn.Sequential(layer), torch.randn(2, 32, 6, 6), report=True)
    assert table.rows[0].won == "two-op, groups=1, rank=16" and (fast[0].slices, fast[0].rank) == (1, 16)
    x = torch.randn(2, 32, 6, 6)
    torch.testing.assert_close(fast(x), layer(x), rtol=1e-4, atol=1e-5)


def test_a_model_that_is_slower_as_a_whole_stays_dense(monkeypatch):
    fake_timer(monkeypatch, by_backend(1.0, 1.5, 0.8, deployed=1.1))
    small, x = compressed(), images()
    fast, table = alds.deploy(small, x, report=True)
    assert table.kept == "dense" and not [m for m in fast.modules() if hasattr(m, "encoder")]
    torch.testing.assert_close(fast(x), small(x), rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_measured_for_real():
    small, x = compressed(), images(1)[..., :8, :8]
    before = copy.deepcopy(small.state_dict())
    fast, table = alds.deploy(small, x, rounds=1, report=True)
    assert all(torch.equal(v, before[k]) for k, v in small.state_dict().items()) and fast is not small
    assert {row.name for row in table.rows} == {n for n, m in small.named_modules() if hasattr(m, "encoder")}
    for row in table.rows:
        assert row.source == "measured" and {"dense", "two-op"} <= set(row.times_ms)
        assert all(ms > 0 for ms in row.times_ms.values()) and all(e < 1e-5 for e in row.errors.values())
    assert set(table.model_ms) == {"dense", "two-op", "deployed"} and fast.alds_deployed is table
    torch.testing.assert_close(fast(x), small(x), rtol=1e-4, atol=1e-5)
    assert isinstance(alds.deploy(small, x, rounds=1), nn.Sequential)


def test_equal_calls_are_measured_once_and_calls_are_counted(monkeypatch):
    layer = alds.LowRankLinear(16, 16, 2)
    twin = alds.LowRankLinear(16, 16, 2)
    asked = fake_timer(monkeypatch, by_backend(3.0, 2.0, 4.0))
    _, table = alds.deploy(nn.Sequential(layer, layer, twin, twin), torch.randn(4, 16), report=True)
    assert len(table.rows) == 2 and len(asked) == 2  # one kind of layer, and the whole model
    assert table.rows[0].times_ms["two-op"] == pytest.approx(2 * 2.0 * 1.3)  # called twice; the median round


def test_layers_that_are_not_called():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.idle = alds.LowRankLinear(16, 16, 2), alds.LowRankLinear(16, 16, 3)

        def forward(self, x, scale=1.0):
            return self.used(x) * scale

    model, x = Model(), torch.randn(4, 16)
    _, table = alds.deploy(model, {"x": x, "scale": 2.0}, rounds=1, report=True)
    idle = next(row for row in table.rows if row.name == "idle")
    assert idle.note == "not called with the example inputs" and not idle.times_ms and math.isnan(idle.ratio)


# ---------------------------------------------------------------------------------------------- forced


@pytest.mark.parametrize("backend", ["dense", "two-op", "fused"])
def test_forced(backend):
    torch.manual_seed(0)
    small, x = nn.Sequential(alds.LowRankLinear(16, 16, 2), nn.ReLU(), alds.LowRankLinear(16, 8, 2)), torch.randn(4, 16)
    fast, table = alds.deploy(small, x, backend=backend, rounds=1, report=True)
    assert all(row.won == backend and row.source == "forced" for row in table.rows)
    torch.testing.assert_close(fast(x), small(x), rtol=1e-4, atol=1e-5)


def test_merged_layers_are_not_saved(tmp_path):
    model = nn.Sequential(MergedPart(MergedLinears([alds.LowRankLinear(16, 8, 2)]), 0))
    with pytest.raises(ModelError, match="merged layers cannot be saved"):
        alds.save(model, tmp_path / "m.safetensors")


def test_forced_fused_names_the_layer():
    model = nn.Sequential(nn.ReLU(), alds.LowRankConv2d(8, 8, 3, 2, conv_groups=2))
    with pytest.raises(
        BackendError, match="layer '1': backend='fused' cannot run it: the convolution is grouped itself"
    ):
        alds.deploy(model, torch.randn(1, 8, 5, 5), backend="fused")


# ------------------------------------------------------------------------------------------- the table


def test_table_is_saved_and_used_again(monkeypatch, tmp_path):
    asked = fake_timer(monkeypatch, by_backend(3.0, 2.0, 4.0))
    small, x = compressed(), images()
    _, table = alds.deploy(small, x, report=True)
    table.save(tmp_path / "t.json")
    assert DeployTable.load(tmp_path / "t.json") == table
    asked.clear()
    _, reused = alds.deploy(small, x, table=tmp_path / "t.json", report=True)
    assert len(asked) == 1 and all(row.source == "table" for row in reused.rows)  # only the whole model
    assert [row.won for row in reused.rows] == [row.won for row in table.rows]
    asked.clear()
    alds.deploy(small, images(5), table=table)
    assert len(asked) > 1  # another input is another call


def test_table_of_other_hardware_is_not_used(monkeypatch):
    asked = fake_timer(monkeypatch, by_backend(3.0, 2.0, 4.0))
    small, x = compressed(), images()
    _, table = alds.deploy(small, x, report=True)
    other = DeployTable(table.rows, {**table.environment, "device": "another"}, table.model_ms, table.kept)
    asked.clear()
    _, measured = alds.deploy(small, x, table=other, report=True)
    assert len(asked) > 1 and all(row.source == "measured" for row in measured.rows)


def test_table_is_printed(monkeypatch):
    fake_timer(monkeypatch, by_backend(3.0, 2.0, 4.0))
    _, table = alds.deploy(compressed(), images(), report=True)
    text = str(table)
    for part in ("dense ms", "two-op ms", "fused ms", "ratio", "1.50", "kept: deployed", "dense 3."):
        assert part in text
    assert repr(table) == f"<DeployTable of {len(table.rows)} layers, kept: deployed; print() has them>"
    assert "dense ms" in table._repr_html_()


def test_notes_stand_below_the_table_each_once(monkeypatch):
    fake_timer(monkeypatch, by_backend(3.0, 2.0, 4.0))
    _, table = alds.deploy(compressed(), images(), report=True)
    first, *others = table.rows
    notes = [
        replace(first, note="not fused: too wide"),
        *(replace(row, note="not fused: on the CPU") for row in others),
    ]
    lines = str(replace(table, rows=(*notes, replace(first, note="")))).splitlines()[2:]
    cells = [line.split()[-1] for line in lines[: len(table.rows) + 1]]
    assert len(others) > 1 and cells[:-1] == ["1", *["2"] * len(others)] and "e" in cells[-1]
    assert lines[len(table.rows) + 1 : -1] == ["note 1: not fused: too wide", "note 2: not fused: on the CPU"]


@pytest.mark.parametrize("text", ["", "{}", "[]", "nonsense", '{"format": "alds_fast.deploy", "version": 9}'])
def test_bad_tables(tmp_path, text):
    path = tmp_path / "t.json"
    path.write_text(text)
    with pytest.raises(FileFormatError, match="not a table that deploy saved"):
        alds.deploy(compressed(), images(), table=path)


def test_bad_fields_of_a_table(tmp_path, monkeypatch):
    fake_timer(monkeypatch, by_backend(3.0, 2.0, 4.0))
    _, table = alds.deploy(compressed(), images(), report=True)
    table.save(tmp_path / "t.json")
    data = json.loads((tmp_path / "t.json").read_text())
    for field, value in (
        ("won", "magic"),
        ("won", "two-op, foo"),
        ("times_ms", {"dense": -1}),
        ("times_ms", {"magic": 1.0, "dense": 3.0}),
        ("name", 3),
        ("errors", 5),
    ):
        bad = copy.deepcopy(data)
        bad["rows"][0][field] = value
        (tmp_path / "t.json").write_text(json.dumps(bad))
        with pytest.raises(FileFormatError):
            DeployTable.load(tmp_path / "t.json")
    with pytest.raises(MissingFileError):
        DeployTable.load(tmp_path / "none.json")
    with pytest.raises(MissingFileError):
        table.save(tmp_path / "none" / "t.json")


# ------------------------------------------------------------------------------------------ edge cases


@pytest.mark.parametrize(
    "options, error, message",
    [
        ({"backend": "magic"}, ArgumentError, "backend='magic' is not None or one of dense, two-op, fused"),
        ({"rounds": 0}, ArgumentError, "rounds=0 is not an integer >= 1"),
        ({"table": 3}, ArgumentError, "table is a int"),
    ],
)
def test_bad_arguments(options, error, message):
    with pytest.raises(error, match=message):
        alds.deploy(compressed(), images(), **options)


def test_example_that_does_not_run():
    with pytest.raises(ModelError, match="example_inputs did not run"):
        alds.deploy(compressed(), torch.randn(1, 5, 12, 12))
    with pytest.raises(ModelError, match="pass the torch.nn.Module itself"):
        alds.deploy("model", images())


def test_a_model_without_low_rank_layers():
    with pytest.warns(UserWarning, match="the model has no low-rank layer: what deploy gives is a copy of it"):
        fast, table = alds.deploy(small_net(), images(), rounds=1, report=True)
    assert table.rows == () and table.kept == "deployed"
    torch.testing.assert_close(fast(images()), small_net()(images()))


def test_training_mode_and_tied_biases_survive(monkeypatch):
    fake_timer(monkeypatch, by_backend(1.0, 2.0, 4.0))
    layers = [alds.LowRankLinear(16, 16, 2), alds.LowRankLinear(16, 16, 2)]
    layers[1].bias = layers[0].bias
    model = nn.Sequential(*layers, nn.Dropout()).train()
    fast = alds.deploy(model, torch.randn(4, 16))
    assert fast.training and fast[0].bias is fast[1].bias and fast[0].bias is not layers[0].bias


@pytest.mark.slow
def test_a_deployed_model_trains_compiles_and_is_saved(tmp_path):
    torch._dynamo.reset()
    small, x = compressed(), images(1)[..., :8, :8]
    fast = alds.deploy(small, x, rounds=1)
    torch.testing.assert_close(torch.compile(fast, backend="aot_eager")(x), fast(x))
    alds.save(fast, tmp_path / "fast.safetensors")
    torch.testing.assert_close(alds.load(tmp_path / "fast.safetensors", small_net())(x), fast(x))
    fast(x).sum().backward()
    assert all(p.grad is not None for p in fast.parameters())


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
@pytest.mark.parametrize("deployed", [0.9, 9.0])
def test_hooks_are_kept(monkeypatch, order, deployed):
    fake_timer(monkeypatch, by_backend(1.0, 2.0, 4.0, deployed))
    layers, seen = [alds.LowRankLinear(16, 16, 2), alds.LowRankLinear(16, 16, 2)], []
    layers[0].register_forward_hook(lambda *a: seen.append(1))
    model, x = nn.Sequential(*(layers[i] for i in order)), torch.randn(4, 16)
    fast, table = alds.deploy(model, x, report=True)
    hooked = next(row for row in table.rows if row.name == str(order.index(0)))
    assert "dense" not in hooked.times_ms
    seen.clear()
    fast(x)
    assert seen == [1] and any(isinstance(m, nn.Linear) for m in fast)
    with pytest.raises(BackendError, match="cannot replace it: it has hooks"):
        alds.deploy(model, x, backend="dense")


def test_subclasses_and_tied_factors_keep_their_form(monkeypatch):
    class Doubled(alds.LowRankLinear):
        def forward(self, input):
            return 2 * super().forward(input)

    fake_timer(monkeypatch, by_backend(1.0, 2.0, 4.0))
    model, x = (
        nn.Sequential(Doubled(16, 16, 2), alds.LowRankLinear(16, 16, 2), alds.LowRankLinear(16, 16, 2)),
        torch.randn(4, 16),
    )
    model[2].encoder = model[1].encoder
    fast = alds.deploy(model, x)
    assert isinstance(fast[0], Doubled) and fast[1].encoder is fast[2].encoder
    torch.testing.assert_close(fast(x), model(x), rtol=1e-4, atol=1e-5)


def test_the_fastest_of_the_three_whole_models_is_kept(monkeypatch):
    model, x = nn.Sequential(alds.LowRankLinear(32, 32, 2)), torch.randn(4, 32)
    for dense, two_op, deployed, kept in (
        (3.0, 2.0, 2.5, "two-op"),
        (3.0, 2.0, 2.01, "deployed"),
        (1.0, 2.0, 1.5, "dense"),
    ):
        whole = {"dense": dense, "two-op": two_op, "deployed": deployed}

        def interleaved_ms(calls, device, *, rounds, whole=whole):
            return {
                name: [whole[name] if "deployed" in calls else {"two-op": 1.0}.get(name, 2.0)] * rounds
                for name in calls
            }

        for module in (autotune, timer):
            monkeypatch.setattr(module, "interleaved_ms", interleaved_ms)
        fast, table = alds.deploy(model, x, report=True)
        assert table.kept == kept and isinstance(fast[0], nn.Linear) == (kept == "dense")
        ratios = {"deployed / two-op": deployed / two_op, "deployed / dense": deployed / dense}
        ratios["two-op / dense"] = two_op / dense
        assert table.decided == f"kept: {kept}, by the medians of paired ratios of times: " + ", ".join(
            f"{name} {ratio:.3f} (quartiles 0% apart)" for name, ratio in ratios.items()
        )
        assert table.decided in str(table)


def test_runs_of_a_busy_machine_are_repeated_and_warned_of(monkeypatch, tmp_path):
    rounds_made = []

    def interleaved_ms(calls, device, *, rounds):
        if "deployed" not in calls:
            return {name: [1.0 if name == "two-op" else 2.0] * rounds for name in calls}
        rounds_made.append(rounds)
        return {name: [1.0 + i % 2 * (name == "two-op") for i in range(rounds)] for name in calls}

    for module in (autotune, timer):
        monkeypatch.setattr(module, "interleaved_ms", interleaved_ms)
    model, x = nn.Sequential(alds.LowRankLinear(32, 32, 2)), torch.randn(4, 32)
    with pytest.warns(UserWarning, match=r"the machine is busy.*two-op / dense 1.000 \(quartiles 100% apart\)"):
        table = alds.deploy(model, x, report=True, rounds=5)[1]
    assert rounds_made == [5, 5, 5] and not table.steady
    table.save(tmp_path / "table.json")
    assert alds.DeployTable.load(tmp_path / "table.json") == table


def test_nothing_is_said_to_have_decided_where_no_layer_uses_its_factors(monkeypatch):
    fake_timer(monkeypatch, by_backend(1.0, 2.0, 4.0))
    table = alds.deploy(nn.Sequential(alds.LowRankLinear(16, 16, 2)), torch.randn(4, 16), report=True)[1]
    assert (table.decided, table.rows[0].won, table.ratios) == ("kept: deployed, every layer dense", "dense", {})


@pytest.mark.parametrize(("filters", "won"), [(32, "fused"), (40, "two-op")])
def test_scheme_3_is_fused_where_a_kernel_takes_it(monkeypatch, filters, won):
    fake_timer(monkeypatch, by_backend(3.0, 2.0, 1.0))
    layer = alds.LowRankConv2d(16, filters, 3, 16, scheme=3, padding=1).half()
    x = torch.randn(2, 16, 6, 5).half()
    fast, table = alds.deploy(nn.Sequential(layer), x, report=True)
    assert table.rows[0].won == won and fast[0].backend == {"fused": "fused-first"}.get(won, won)
    torch.testing.assert_close(fast(x), layer(x), rtol=1e-2, atol=1e-2)


@pytest.mark.slow
def test_other_numbers_of_rows_run_after_a_fused_win(monkeypatch):
    fake_timer(monkeypatch, by_backend(3.0, 2.0, 1.0))
    model = nn.Sequential(alds.LowRankLinear(700, 700, 520))
    fast, table = alds.deploy(model, torch.randn(2, 700), report=True)
    assert table.rows[0].won.startswith("fused") and fast[0].backend == "fused-first"
    x = torch.randn(17, 700)
    torch.testing.assert_close(fast(x), model(x), rtol=1e-4, atol=1e-4)
    assert fast.double()(x.double()).dtype == torch.float64


def test_a_kernel_that_fails_is_left_out(monkeypatch):
    fake_timer(monkeypatch, by_backend(3.0, 2.0, 1.0))

    def broken(*args):
        raise RuntimeError("out of resource: shared memory")

    monkeypatch.setattr("alds_fast.kernels.fused.linear.plan_linear", broken)
    _, table = alds.deploy(nn.Sequential(alds.LowRankLinear(32, 32, 4)), torch.randn(20, 32), report=True)
    assert table.rows[0].won.startswith("two-op") and "shared memory" in table.rows[0].note


@pytest.mark.parametrize("value", [1e-3, float("nan")])
def test_a_kernel_that_is_wrong_is_left_out(monkeypatch, value):
    fake_timer(monkeypatch, by_backend(3.0, 2.0, 1.0))
    right = linear_kernels.plan_linear

    def plan(*args):
        run = right(*args)

        def wrong(*tensors):
            run(*tensors)
            tensors[-1][3, 5] += value * tensors[-1].norm()

        return wrong

    monkeypatch.setattr(linear_kernels, "plan_linear", plan)
    _, table = alds.deploy(nn.Sequential(alds.LowRankLinear(32, 32, 4)), torch.randn(20, 32), report=True)
    assert table.rows[0].won.startswith("two-op") and " is wrong: its error is" in table.rows[0].note


def test_autocast_inside_the_model():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = alds.LowRankLinear(16, 16, 2), alds.LowRankLinear(16, 16, 2)

        def forward(self, x):
            with torch.autocast("cpu", torch.bfloat16):
                return self.b(self.a(x))

    model, x = Model(), torch.randn(4, 16)
    fast, table = alds.deploy(model, x, rounds=1, report=True)
    assert fast(x).dtype == torch.bfloat16 and all('"autocast": "bfloat16"' in row.call for row in table.rows)


def test_state_that_a_forward_changes_is_put_back():
    class Counting(nn.Sequential):
        def __init__(self, *layers):
            super().__init__(*layers)
            self.register_buffer("count", torch.zeros(()))

        def forward(self, x):
            self.count += 1
            return super().forward(x) + torch.rand(())

    model, x = Counting(alds.LowRankLinear(16, 16, 2)), torch.randn(4, 16)
    torch.manual_seed(7)
    fast = alds.deploy(model, x, rounds=1)
    assert model.count == 0 and fast.count == 0
    drawn = torch.rand(3)
    torch.manual_seed(7)
    assert torch.equal(drawn, torch.rand(3))


@pytest.mark.parametrize("buffer", [torch.eye(16).to_sparse(), torch.full((1,), float("nan")).expand(4)])
def test_unusual_buffers(buffer):
    model = nn.Sequential(alds.LowRankLinear(16, 16, 2))
    model.register_buffer("odd", buffer)
    assert isinstance(alds.deploy(model, torch.randn(4, 16), rounds=1), nn.Sequential)


@pytest.mark.parametrize("decorated", [True, False])
def test_inference_mode(decorated):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.q, self.k = alds.LowRankLinear(16, 16, 2), alds.LowRankLinear(16, 16, 2)

        def forward(self, x):
            with torch.inference_mode(decorated):
                return self.q(x) + self.k(x)

    model, x = Model(), torch.randn(4, 16)
    with torch.inference_mode(not decorated):
        fast = alds.deploy(model, x, rounds=1)
        torch.testing.assert_close(fast(x), model(x), rtol=1e-4, atol=1e-5)


def test_transformer_encoder_returns_to_its_fast_path():
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    dense, x = nn.TransformerEncoder(layer, 2).eval(), torch.randn(2, 5, 16)
    small = alds.compress(dense, params=0.8, include="*.linear*")
    fast = alds.deploy(small, x, backend="dense", rounds=1)
    assert fast.layers[0].activation_relu_or_gelu == dense.layers[0].activation_relu_or_gelu != 0
    assert fast.use_nested_tensor == dense.use_nested_tensor
    torch.testing.assert_close(fast(x), small(x), rtol=1e-4, atol=1e-4)


def test_progress_is_told_layer_by_layer():
    small, told = alds.compress(nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64)), params=0.5), []
    alds.deploy(small, torch.randn(8, 64), rounds=1, progress=lambda *args: told.append(args))
    count = sum(isinstance(m, alds.LowRankLinear) for m in small)
    assert told == [("layers timed", i + 1, count) for i in range(count)] and count
