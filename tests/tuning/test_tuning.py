"""The search for tilings, on the CPU: a device that compiles nothing and times by the model, kernels interpreted."""

import copy
import math
import warnings

import pytest
import torch

import alds_fast as alds
from alds_fast.deployment import tuned_forms
from alds_fast.deployment.autotune import is_plain
from alds_fast.deployment.layer_rows import merge_groups
from alds_fast.errors import ArgumentError
from alds_fast.kernels import ConvKey, DecodeKey, EncodeKey, LinearKey, Tiling, measured, using
from alds_fast.kernels.fused import conv2d_walk
from alds_fast.kernels.tilings import tables
from alds_fast.layers import LowRankConv2d, LowRankLayer, LowRankLinear, MergedLinears
from alds_fast.measurement import InputSpec, layer_inputs, prepare
from alds_fast.tuning import FusedCall, search, tune_calls
from alds_fast.tuning.candidates import MOST_MEASURED, launch_candidates, space
from alds_fast.tuning.cost import resident, seconds_of
from alds_fast.tuning.rates import A100, H100
from alds_fast.tuning.work import work_of

CPU = torch.device("cpu")
GUESS_US = 1e6


class ModelDevice:
    """A device on which launches take the time of the model, and the first guess a second."""

    def __init__(self):
        self.device, self.rates = CPU, H100
        self.compiled, self.timed, self.spoiled, self.guess_us = [], [], {}, GUESS_US

    def compile(self, work, told):
        self.compiled += work
        return {}

    def prepare(self, call, sets):
        """As a graph does, every run takes the tilings that there are when it is made."""
        tilings = dict(tables._tables[CPU])

        def run(tensors):
            with using(CPU, tilings):
                return call(tensors)

        prepared = prepare(run, sets, CPU)
        taken = tuple(tables._tables[CPU].values())
        faults = [self.spoiled[t] for t in taken if t in self.spoiled]
        return prepared._replace(run=faults[0](prepared.run)) if faults else prepared

    def microseconds(self, prepared, key, tiling, samples):
        self.timed.append((key, tiling, samples))
        return self.guess_us if tiling is None else 1e6 * seconds_of(key, tiling, self.rates)


@pytest.fixture(autouse=True)
def nothing_known(monkeypatch):
    monkeypatch.setattr(tables, "_tables", {})
    monkeypatch.setattr(tables, "_measured", {})


@pytest.fixture
def on():
    return ModelDevice()


def fused(module, x, name="layer"):
    module = module.to(x.dtype)
    module.backend = "fused"
    outputs = lambda y: [y] if isinstance(y, torch.Tensor) else list(y)  # noqa: E731
    plain, exact = (type(module).__new__(type(module)) for _ in range(2))
    for other, dtype in ((plain, x.dtype), (exact, torch.float64)):
        vars(other).update(vars(module))
        vars(other)["_parameters"] = {
            n: None if p is None else torch.nn.Parameter(p.detach().to(dtype), False)
            for n, p in module._parameters.items()
        }
        other.backend = "two-op"
    return FusedCall(name, lambda: module, InputSpec.of(x), lambda x: outputs(plain(x)), lambda x: outputs(exact(x)))


def linear_call(rows=40, dtype=torch.float16, **options):
    return fused(LowRankLinear(48, 32, 16, **options), torch.zeros(rows, 48, dtype=dtype))


def told(*of_progress):
    pass


@pytest.mark.parametrize(
    ("call", "kinds"),
    [
        (lambda: linear_call(), [LinearKey]),
        (lambda: linear_call(rows=20, dtype=torch.float32, bias=False), [LinearKey]),
        (lambda: linear_call(rows=1), [EncodeKey, DecodeKey]),
        (lambda: linear_call(rows=5), [EncodeKey, DecodeKey]),
        (lambda: fused(LowRankConv2d(16, 32, 3, 16, padding=1), torch.zeros(1, 16, 5, 4).half()), [ConvKey]),
        (lambda: fused(LowRankConv2d(6, 10, 3, 4, stride=2), torch.zeros(2, 6, 9, 9)), [ConvKey]),
        (lambda: fused(LowRankConv2d(16, 32, 3, 16, scheme=3, padding=1), torch.zeros(3, 16, 5, 4).half()), [ConvKey]),
    ],
)
def test_launches_take_the_best_by_measurement(on, call, kinds):
    call = call()
    rows = tune_calls([call], on, told)
    assert [type(row.key) for row in rows] == kinds
    for row in rows:
        tried = launch_candidates(row.key, H100)
        assert row.faults == {} and row.timed == len(tried) > 1
        times = {t: seconds_of(row.key, t, H100) for t in tried}
        assert times[row.found.tiling] == min(times.values()) and row.found.us == 1e6 * min(times.values())
        assert row.found.guess_us == GUESS_US and 0 <= row.found.error < 2e-3
        assert measured(CPU)[row.key] == row.found and tables.tuned(CPU, row.key) == row.found.tiling
    x = call.spec.make(1)
    ours, wanted = call.make()(x), call.plain(x)[0]
    assert torch.allclose(ours.float(), wanted.float(), atol=5e-3)
    assert tune_calls([call], on, told) == []  # all is known


def test_merged_layers_and_equal_calls(on):
    layers = [LowRankLinear(32, 16, 8).half() for _ in range(3)]
    x = torch.zeros(3, 32).half()
    merged, plain, exact = (MergedLinears(layers, kind) for kind in ("fused", "two-op", "two-op"))
    call = FusedCall("q + k + v", lambda: merged, InputSpec.of(x), plain, exact.double())
    rows = tune_calls([call, call._replace(name="again")], on, told)
    assert [(row.name, type(row.key)) for row in rows] == [("q + k + v", EncodeKey), ("q + k + v", DecodeKey)]
    assert rows[1].key.ranks == (8, 8, 8) and rows[1].key.filters == (16, 16, 16)


def test_int8_factors_have_tilings_of_their_own(on):
    layer = LowRankLinear(48, 32, 16).half()
    small = alds.quantize_factors(torch.nn.Sequential(layer))[0]
    small.backend = "fused"
    x, plain = torch.zeros(5, 48).half(), copy.copy(small)
    plain.backend = "two-op"
    call = FusedCall(
        "int8", lambda: small, InputSpec.of(x), lambda x: [plain(x)], lambda x: [copy.deepcopy(plain).double()(x)]
    )
    rows = tune_calls([call, linear_call(rows=5)], on, told)
    assert [(type(row.key), row.key.int8) for row in rows] == [
        (EncodeKey, True), (DecodeKey, True), (EncodeKey, False), (DecodeKey, False),
    ]  # fmt: skip
    assert work_of(rows[0].key, Tiling(16, 32, 16, 4, 3)).memory_bytes == 48 * 16
    assert {c.key for c in on.compiled} == {row.key for row in rows} and not any(row.faults for row in rows)


def test_candidates_are_halved(on):
    (row,) = tune_calls([linear_call()], on, told)
    counts = {n: sum(samples == n and t is not None for _, t, samples in on.timed) for n in search.SAMPLES}
    assert counts == {1: row.timed, 5: math.ceil(row.timed / 2), 20: search.FINALISTS}
    assert len(on.compiled) == row.timed and {c.key for c in on.compiled} == {row.key}


def wrong(run):
    return lambda: [[y + 1 for y in outputs] for outputs in run()]


def wrong_at_times(run):
    calls = []

    def sometimes():
        calls.append(None)
        return wrong(run)() if len(calls) == 2 else run()

    return sometimes


def failing(run):
    def fail():
        raise RuntimeError("out of resource: shared memory")

    return fail


def wrong_in_one_value(run):
    def change():
        results = run()
        results[-1][0][3, 7] += 0.5
        return results

    return change


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        (wrong, "ArithmeticError: errors"),
        (wrong_at_times, "ArithmeticError: errors"),
        (wrong_in_one_value, "ArithmeticError: errors"),
        (failing, "out of resource"),
    ],
)
def test_tilings_that_are_wrong_or_fail_do_not_count(on, fault, reason):
    call = linear_call()
    (row,) = tune_calls([call], on, told)
    tables._tables.clear()
    tables._measured.clear()
    best = row.found.tiling
    on.spoiled = {best: fault}
    (again,) = tune_calls([call], on, told)
    assert list(again.faults) == [best] and reason in again.faults[best]
    assert again.found.tiling not in (best, None) and again.found.us >= row.found.us


def test_a_first_guess_that_is_wrong_is_not_tuned(on):
    good = prepare
    on.prepare = lambda call, sets: (
        good(call, sets, CPU)._replace(run=wrong(lambda: [call(s) for s in sets]))
        if sets[0][1].shape[0] == 40 else good(call, sets, CPU)
    )  # fmt: skip
    with pytest.warns(
        UserWarning, match=r"bad is not tuned on cpu: ArithmeticError: the fused kernel is wrong with its"
    ):
        (row,) = tune_calls([linear_call()._replace(name="bad"), linear_call(rows=20)], on, told)
    assert row.key.rows == 32 and list(measured(CPU)) == [row.key]


def test_a_first_guess_that_cannot_be_launched(on):
    """On a device with less shared memory than those it was made for."""
    guesses = []

    def refused(call, sets):
        if not tables._tables[CPU]:
            guesses.append(None)
            raise RuntimeError("out of resource: shared memory")
        return prepare(call, sets, CPU)

    on.prepare = refused
    (row,) = tune_calls([linear_call()], on, told)
    best = min(seconds_of(row.key, t, H100) for t in launch_candidates(row.key, H100))
    assert len(guesses) == 1 and row.found.guess_us is None and row.found.us == 1e6 * best and row.faults == {}
    assert " - " in str(tuned_forms.TuningTable((row,)))

    def never(call, sets):
        raise RuntimeError("no compiler")

    on.prepare = never
    with pytest.warns(UserWarning, match="no tiling of .* runs: RuntimeError: no compiler"):
        assert tune_calls([linear_call(rows=70)], on, told) == []


def refused(module, inputs, output):
    """A hook on the launches: the first guess is refused."""
    if module.backend == "fused" and not len(tables._tables[CPU]):
        raise RuntimeError("out of resource: shared memory")


def test_a_first_guess_that_is_refused_at_once(on, caplog):
    """By the launch that asks for its key, before anything is prepared."""
    call = linear_call()
    call.make().register_forward_hook(refused)
    with warnings.catch_warnings(), caplog.at_level("INFO"):
        warnings.simplefilter("error")
        (row,) = tune_calls([call], on, told)
    assert row.found.tiling is not None and row.found.guess_us is None and row.faults == {}
    assert {(c.key, c.tiling) for c in on.compiled} == {(row.key, t) for t in launch_candidates(row.key, H100)}
    assert f"layer: the first guess of {row.key} cannot be launched: out of resource" in caplog.text
    assert str(tuned_forms.TuningTable((row,))).splitlines()[-1].split()[2] == "-"


def test_what_fails_is_left_as_it_is(on):
    good = linear_call()
    bad = linear_call(rows=70)._replace(name="bad", plain=lambda x: 1 / 0)
    worse = linear_call(rows=130)._replace(name="worse", make=lambda: torch.nn.Linear(3, 3))
    with pytest.warns(UserWarning) as warned:
        (row,) = tune_calls([worse, bad, good], on, told)
    texts = [str(w.message) for w in warned]
    assert row.name == "layer" and texts[0].startswith("worse is not tuned on cpu: RuntimeError: mat1")
    assert texts[1] == "bad is not tuned on cpu: ZeroDivisionError: division by zero"


def test_the_first_guess_stays_unless_another_is_clearly_faster(on):
    (row,) = tune_calls([linear_call()], on, told)
    best = row.found.us
    for guess_us, kept in ((best * 1.03, row.found.tiling), (best * 1.01, None), (best / 2, None)):
        tables._tables.clear()
        tables._measured.clear()
        on.guess_us = guess_us
        (row,) = tune_calls([linear_call()], on, told)
        assert (row.found.tiling, row.found.us) == (kept, best if kept else guess_us)
        assert tables.tuned(CPU, row.key) == kept


def test_what_need_not_be_launched_is_not(on):
    on.compile = lambda work, told: {(work[0].key, work[0].tiling): "takes too much"}
    (row,) = tune_calls([linear_call()], on, told)
    (left_out,) = row.faults
    assert row.faults[left_out] == "takes too much" and all(t != left_out for _, t, _ in on.timed)


class Attention(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.q, self.k = (torch.nn.Linear(64, 64) for _ in range(2))
        self.out = torch.nn.Linear(64, 96)

    def forward(self, x):
        return self.out(self.q(x) + self.k(x))


def test_all_forms_that_deploy_tries_are_tuned(on, monkeypatch):
    monkeypatch.setattr(search, "launch_candidates", lambda *of: launch_candidates(*of)[:1])
    x = torch.randn(4, 64)
    small = alds.compress(Attention(), params=0.4, example_inputs=x, groups=(1,), progress=False)
    layers = {name: m for name, m in small.named_modules() if isinstance(m, LowRankLayer)}
    cases = {name: (specs, is_plain(layers[name], ())) for name, specs in layer_inputs(small, x, layers).items()}
    groups = merge_groups(small, x, layers, cases)
    calls = tuned_forms.fused_calls(layers, groups, cases)
    names = [call.name for call in calls]
    assert {"q", "out", "q + k"} <= set(names) and any(", groups=1, rank=" in name for name in names)
    assert "k" not in names and len(set(names)) == len(names)  # as q, once
    table = tuned_forms.TuningTable(tuple(tune_calls(calls, on, told)))
    text = str(table)
    assert text.splitlines()[0].split()[:2] == ["layer", "launch"] and "encode" in text and "reduction=" in text
    assert "nothing to tune" in str(tuned_forms.TuningTable(tuple(tune_calls(calls, on, told))))


def test_without_a_gpu_tune_says_so():
    small = alds.compress(torch.nn.Sequential(torch.nn.Linear(64, 64)), params=0.5, progress=False)
    with pytest.raises(ArgumentError, match=r"tune needs a model on a CUDA device, this one is on cpu"):
        alds.tune(small, torch.randn(2, 64))
    with pytest.raises(ArgumentError, match=r"tune=True goes with backend=None and a model on a CUDA device"):
        alds.deploy(small, torch.randn(2, 64), tune=True)
    with pytest.raises(ArgumentError, match=r"tune=1 is not True, False or None"):
        alds.deploy(small, torch.randn(2, 64), tune=1)


HALF = torch.bfloat16
EPILOGUE = False, False, None, True, "ieee"
ONES = ((1, 1),) * 3


def conv_key(side, channels, hidden, groups=1):
    pixels = 128 * side**2
    return ConvKey(HALF, pixels, channels, channels, hidden, groups, (side, side), (3, 3), *ONES, *EPILOGUE)


KEYS = [
    *(conv_key(56, 64, q) for q in (16, 32)), conv_key(28, 128, 64), conv_key(28, 128, 64, 4), conv_key(7, 512, 128),
    *(conv_key(56, 64, q)._replace(scheme=3) for q in (16, 32)), conv_key(7, 32, 16)._replace(scheme=3),
    LinearKey(HALF, 32768, 768, 3072, 128, 1, False, *EPILOGUE),
    LinearKey(torch.float32, 4096, 768, 3072, 256, 1, False, *EPILOGUE),
    *(EncodeKey(HALF, m, 4096, 1024, 1, m < 3, "ieee") for m in (1, 2, 16)),
    *(DecodeKey(HALF, m, (1024,) * 3, (4096,) * 3, m < 3, False, False, None, True, "ieee") for m in (1, 2, 16)),
]  # fmt: skip


@pytest.mark.parametrize("rates", [H100, A100], ids=["H100", "A100"])
@pytest.mark.parametrize("key", KEYS, ids=lambda key: type(key).__name__)
def test_candidates_fit_and_are_the_best_by_the_model(key, rates):
    chosen = launch_candidates(key, rates)
    assert 2 < len(chosen) <= MOST_MEASURED and len(set(chosen)) == len(chosen)
    times = {t: seconds_of(key, t, rates) for t in space(key)}
    fits = [s for s in times.values() if s is not None]
    assert times[chosen[0]] == min(fits)
    for t in chosen:
        assert resident(work_of(key, t), t, rates) > 0 and times[t] <= 1.5 * min(fits)
        assert all(n & (n - 1) == 0 for n in t[:4])
        if t.by_rows:
            assert (key.channels // key.groups) % t.reduction == 0


def test_the_model_knows_what_it_costs():
    key = conv_key(56, 64, 16)
    rows, taps = Tiling(64, 64, 64, 4, 2, by_rows=True), Tiling(64, 64, 64, 4, 3)
    assert seconds_of(key, rows, H100) < seconds_of(key, taps, H100) < seconds_of(key, taps, A100)
    work = work_of(key, taps)
    assert (work.programs, work.loops[0].times) == (-(-128 * 56 * 56 // 64), 9)
    assert work.memory_bytes == 2 * (2 * 128 * 56 * 56 * 64 + 16 * (9 * 64 + 64))
    large = LinearKey(HALF, 4096, 4096, 4096, 256, 1, False, *EPILOGUE)
    too_much = Tiling(128, 128, 128, 8, 4)
    assert work_of(large, too_much).shared_bytes(4) == 2 * 4 * (128 + 256) * 128 > H100.shared_limit
    assert seconds_of(large, too_much, H100) is None  # shared memory
    assert seconds_of(large, Tiling(128, 64, 64, 4, 2), H100) is None  # registers
    assert seconds_of(large, Tiling(64, 64, 64, 8, 3), H100) > 0


def test_the_model_knows_a_walk_down_the_image():
    key = conv_key(56, 64, 32)._replace(scheme=3)
    tiling = conv2d_walk.first_walk(key, key.pixels, True)
    assert tiling == Tiling(64, 64, 64, 4, 2, 4) and tiling in set(space(key))
    work = work_of(key, tiling)
    assert (work.programs, [loop.times for loop in work.loops]) == (128 * 4, [16, 15])
    assert work.memory_bytes == 2 * (2 * key.pixels * 64 + 32 * 64 + 9 * 32 * 64)
    assert work_of(key, tiling._replace(parts=8)).l2_bytes > work.l2_bytes  # rows between strips are read twice
    assert seconds_of(key, tiling, H100) > 0 and seconds_of(key, tiling, A100) is None  # registers of a decoder
    half = conv2d_walk.first_walk(key, key.pixels, False)
    assert half.cols == 32 and seconds_of(key, half, A100) > seconds_of(key, tiling, H100)
    assert conv2d_walk.first_walk(key._replace(hidden=16), key.pixels, False).cols == 64
    small = conv2d_walk.first_walk(conv_key(7, 32, 16)._replace(scheme=3), 2 * 7 * 7, True)
    assert small == Tiling(64, 32, 32, 4, 2, 1)
