"""``benchmark``: low-rank layers beside dense ones on the machine at hand."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from ..checks import check_model, is_count
from ..errors import ArgumentError
from ..measurement import device_of, environment
from ..progress import ProgressOption, telling
from ..version import __version__
from .benchmark import Benchmark
from .cases import Operation
from .registered import CONV, LINEAR
from .rows import BenchSettings, measure, settings
from .timing import SHORT, ceilings
from .whole_model import measure_model

Counts = int | Sequence[int]


def _counts(value: Counts, name: str) -> tuple[int, ...]:
    several = tuple(value) if isinstance(value, list | tuple | range) else (value,)
    if not several or not all(map(is_count, several)):
        raise ArgumentError(f"{name}={value!r}: expected an integer >= 1, or several")
    return tuple(map(int, several))


def _shape(value: Sequence[int], name: str, words: str) -> tuple[int, ...]:
    if isinstance(value, str) or not isinstance(value, Sequence) or len(value) != len(words.split(", ")):
        raise ArgumentError(f"{name}={value!r}: expected ({words})")
    return _counts(value, name)


def _checked(case: Operation, rank: int) -> Operation:
    """The case, if there is a layer like that."""
    if case.channels % case.groups:
        raise ArgumentError(f"groups={case.groups} does not divide the {case.channels} channels")
    if case.is_conv and case.kernel % 2 == 0:
        raise ArgumentError(f"conv: a kernel of {case.kernel} does not keep the size; expected an odd one")
    taps = case.kernel**2
    encoder, decoder = (1, taps) if case.scheme == 3 else (taps, 1)
    most = min(case.filters * decoder, case.channels // case.groups * encoder)
    if rank > most:
        raise ArgumentError(f"rank={rank} is more than the largest rank of {case.key}, {most}")
    return case


def _linears(linear: Sequence[int], rows: Counts, ranks: Counts, groups: int, **options: Any) -> list[Operation]:
    c, f = _shape(linear, LINEAR, "in_features, out_features")
    every = [(r, m) for r in _counts(ranks, "rank") for m in _counts(rows, "rows")]
    return [_checked(Operation(LINEAR, c, f, r * groups, rows=m, groups=groups, **options), r) for r, m in every]


def _convs(
    conv: Sequence[int], image: Counts, batch: Counts, ranks: Counts, groups: int, scheme: int, **options: Any
) -> list[Operation]:
    c, f, kernel = _shape(conv, CONV, "in_channels, out_channels, kernel_size")
    if not is_count(scheme, 0) or scheme not in (0, 3):
        raise ArgumentError(f"scheme={scheme!r} is neither 0, the encoder has the kernel, nor 3, the decoder has it")
    options |= {"groups": groups, "scheme": int(scheme)}
    every = [
        (r, b, s) for r in _counts(ranks, "rank") for b in _counts(batch, "batch") for s in _counts(image, "image")
    ]
    return [
        _checked(Operation(f"{CONV}{kernel}x{kernel}", c, f, r * groups, batch=b, size=s, **options), r)
        for r, b, s in every
    ]  # fmt: skip


def _settings(model: nn.Module | None, device: torch.device | str | None, rounds: int, compile: bool) -> BenchSettings:
    if not is_count(rounds, 2):
        raise ArgumentError(f"rounds={rounds!r} is not an integer >= 2")
    if not isinstance(compile, bool):
        raise ArgumentError(f"compile={compile!r} is neither True nor False")
    try:
        default = "cuda" if torch.cuda.is_available() else "cpu"
        where = torch.device(default if device is None else device) if model is None else device_of(model)
    except (RuntimeError, TypeError) as e:
        raise ArgumentError(f"device={device!r}: {e}") from e
    if where.type not in ("cpu", "cuda") or (where.type == "cuda" and not torch.cuda.is_available()):
        raise ArgumentError(f"device={str(where)!r}: expected 'cpu', or 'cuda' where there is a GPU")
    return replace(settings(where.type, False), device=where, rounds=int(rounds))


def _check_together(given: dict[str, tuple[Any, dict[str, Any]]]) -> None:
    """ArgumentError unless one thing is given, and its options only."""
    what = [name for name, (value, _) in given.items() if value is not None]
    if len(what) != 1:
        raise ArgumentError("give one of linear=, conv= and model=, for example linear=(4096, 4096), rank=1024")
    known = given[what[0]][1]
    for options in (options for _, options in given.values()):
        wrong = [name for name, value in options.items() if value is not None and name not in known]
        if wrong:
            raise ArgumentError(f"{wrong[0]}= does not go with {what[0]}=, which takes {', '.join(known)}")


@torch.inference_mode(False)
def benchmark(
    *,
    linear: Sequence[int] | None = None,
    conv: Sequence[int] | None = None,
    model: nn.Module | None = None,
    rank: Counts | None = None,
    rows: Counts | None = None,
    image: Counts | None = None,
    batch: Counts | None = None,
    groups: int | None = None,
    scheme: int | None = None,
    bias: bool | None = None,
    example_inputs: Any = None,
    params: float | None = None,
    flops: float | None = None,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    rounds: int = 15,
    compile: bool = True,
    progress: ProgressOption = None,
) -> Benchmark:
    """Time a linear layer, a convolution or a whole model: dense, in two calls, compiled, fused, and in your own way.

    The ways take turns, in CUDA graphs on a GPU, and layers on copies of weights and inputs that exceed twice its L2
    cache together; medians and quantiles over the rounds. The floor comes from what the device did at best in the same
    run: bytes and operations a second. Results are compared with float64, those of models with the compressed one's.
    What has no time here, or no error, says why.

    Args:
        linear: (in_features, out_features) of a linear layer, of ``rows`` inputs, 1, 16 and 2048 by default.
        conv: (in_channels, out_channels, kernel_size) of a 2d convolution that keeps the size, of ``batch`` images, 32
            by default, of ``image`` x ``image``, 56 by default, channels last.
        model: a dense model, compressed to ``params`` or ``flops`` (half the operations by default) and run with
            ``example_inputs``, in its own type and on its own device.
        rank: of every channel slice; of ``rank``, ``rows``, ``image`` and ``batch`` several are timed one by one.
        groups: channel slices, 1 by default.
        scheme: of ``conv``: 0, the default, where the encoder has the kernel, 3 where the decoder has it.
        bias: whether the layer has one; it has none by default.
        example_inputs: for ``model``, as :func:`alds_fast.deploy` takes them.
        params, flops: for ``model``, as :func:`alds_fast.compress` takes them.
        dtype: of linear and conv: bfloat16, float16 or float32; by default bfloat16 on a GPU and float32 on a CPU.
        device: of linear and conv: by default a GPU if there is one.
        rounds: turns of every way.
        compile: whether torch.compile of the two calls is one of the ways.
        progress: as of :func:`alds_fast.analyze`.

    Functions of your own take turns with the others once :func:`alds_fast.bench.register` knows them.

    Raises:
        ArgumentError: not just one of linear, conv and model, or an option that does not go with it or is out of range.

    >>> seen = benchmark(linear=(64, 64), rows=4, rank=8, device="cpu", rounds=2, compile=False)
    >>> seen.rows[0]["name"], "compiled" in seen.rows[0]["reasons"], len(seen.rows[0]["gains"]["two_op"])
    ('linear 64->64 m4 q8 float32', True, 3)
    """
    layer = {"rank": rank, "groups": groups, "bias": bias, "dtype": dtype, "device": device}
    given = {
        "linear": (linear, {**layer, "rows": rows}),
        "conv": (conv, {**layer, "image": image, "batch": batch, "scheme": scheme}),
        "model": (model, {"example_inputs": example_inputs, "params": params, "flops": flops}),
    }
    _check_together(given)
    groups, bias = 1 if groups is None else groups, False if bias is None else bias
    if model is not None:
        check_model(model)
        if example_inputs is None:
            raise ArgumentError("model= needs example_inputs=, a tensor, tuple or dict as model(...) takes it")
    ranks: Counts = () if rank is None else rank
    if model is None and rank is None:
        raise ArgumentError("linear= and conv= need rank=, that of every channel slice, for example rank=64")
    if not is_count(groups):
        raise ArgumentError(f"groups={groups!r} is not an integer >= 1")
    groups = int(groups)
    if not isinstance(bias, bool):
        raise ArgumentError(f"bias={bias!r} is neither True nor False")
    options = _settings(model, device, rounds, compile)
    if dtype is None:
        dtype = torch.bfloat16 if options.cuda else torch.float32
        dtype = dtype if model is None else next((p.dtype for p in model.parameters()), dtype)
    if dtype not in SHORT:
        raise ArgumentError(f"dtype={dtype!r} is not one of {', '.join(map(str, SHORT))}")
    common: dict[str, Any] = {"bias": bias, "dtype": str(dtype).removeprefix("torch."), "compiled": compile}
    cases = []
    if linear is not None:
        cases = _linears(linear, (1, 16, 2048) if rows is None else rows, ranks, groups, **common)
    elif conv is not None:
        sizes = 56 if image is None else image, 32 if batch is None else batch
        cases = _convs(conv, *sizes, ranks, groups, 0 if scheme is None else scheme, **common)
    with telling(progress) as told:
        best = ceilings(options.device, False, dtype)
        found = []
        for done, case in enumerate(cases):
            told("cases", done, len(cases))
            found.append(measure(case, options, best, compile))
        told("cases", len(cases), len(cases))
        if model is not None:
            budget = {"flops": 0.5} if params is None and flops is None else {"params": params, "flops": flops}
            found = [measure_model(model, example_inputs, options, best, budget, compile)]
    try:
        triton = importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        triton = "none"
    conditions = environment(options.device) | {"triton": triton, "alds_fast": __version__, "rounds": options.rounds}
    return Benchmark(tuple(map(_plain, found)), best, conditions | {"dtype": common["dtype"]})


def _plain(row: dict[str, Any]) -> dict[str, Any]:
    """Without what was not measured."""
    return {k: v for k, v in row.items() if not (k.endswith("_ms") and v is None) or k == "roofline_ms"}
