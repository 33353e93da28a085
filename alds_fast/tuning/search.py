"""The search: candidates of every launch are verified, then halved by measurement."""

from __future__ import annotations

import copy
import logging
import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from ..errors import ArgumentError
from ..kernels import LaunchKey, Measured, Tiling, asked, keep_tilings, measured, using
from ..measurement import InputSpec, Prepared, copies_for
from ..progress import Progress
from .candidates import launch_candidates
from .compilation import Compilation, without_data
from .rates import Rates

_LOG = logging.getLogger(__name__)
SAMPLES = (1, 5, 20)  # samples of each candidate; after a round the better half is left, after the next three
FINALISTS = 3
CLEARLY_FASTER = 0.98  # of the first guess' time, which a tiling must take at most
RUNS_COMPARED = 2  # runs of a candidate that are compared with float64
ALLOWED = 2.0  # times the error of two library calls


class FusedCall(NamedTuple):
    """What makes a module that runs with the fused kernel, one of its inputs, and what its output is compared with.

    ``plain`` is the same as library calls in the type of the input, ``exact`` in float64; each gives a list of tensors.
    """

    name: str
    make: Callable[[], nn.Module]
    spec: InputSpec
    plain: Callable[[Tensor], Sequence[Tensor]]
    exact: Callable[[Tensor], Sequence[Tensor]]


class TunedRow(NamedTuple):
    """A launch that was tuned: what was found, how many tilings were timed, and why others were not."""

    name: str
    key: LaunchKey
    found: Measured
    timed: int
    faults: dict[Tiling, str]


class TuningDevice(Protocol):
    """Where tilings are compiled and timed."""

    device: torch.device
    rates: Rates

    def compile(self, work: Sequence[Compilation], told: Progress) -> Mapping[tuple[LaunchKey, Tiling], str]:
        """Compile ahead; by key and tiling why it need not be launched."""

    def prepare(self, call: Callable[[Any], Any], sets: Sequence[Any]) -> Prepared:
        """The calls with every set, ready to be run again and again."""

    def microseconds(self, prepared: Prepared, key: LaunchKey, tiling: Tiling | None, samples: int) -> float:
        """Of one call: the median of so many samples, with cold caches."""


def tune_calls(calls: Sequence[FusedCall], on: TuningDevice, told: Progress) -> list[TunedRow]:
    """Find tilings for all launches of the calls that nothing is known of; each call's are kept as soon as found.

    A call that fails, does not fit into memory or is wrong with its first guess is warned about and left as it is.
    """
    if on.device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        raise ArgumentError("tilings cannot be tuned while a CUDA graph is captured: call tune before the capture")
    wanted, seen = list[tuple[FusedCall, list[LaunchKey]]](), set(measured(on.device))
    for call in calls:
        keys = []
        with _warning(call, on.device):
            keys = [key for key in _keys(call, on.device) if key not in seen]
        seen.update(keys)
        if keys:
            wanted.append((call, keys))
    tried = {key: launch_candidates(key, on.rates) for _, keys in wanted for key in keys}
    faults = on.compile(_compilations(wanted, tried), told)
    rows, done, total = list[TunedRow](), 0, sum(len(keys) for _, keys in wanted)
    for call, keys in wanted:
        told("launches tuned", done, total)
        with _warning(call, on.device):
            rows += _tune(call, keys, tried, faults, on)
        done += len(keys)
    told("launches tuned", done, total)
    return rows


@contextmanager
def _warning(call: FusedCall, device: torch.device) -> Iterator[None]:
    """What goes wrong inside is a warning, unless nothing runs on the device any more."""
    try:
        yield
    except Exception as e:  # what the driver, the allocator or the comparison say
        _still_there(device, e)
        warnings.warn(f"{call.name} is not tuned on {device}: {type(e).__name__}: {e}", stacklevel=4)


def _keys(call: FusedCall, device: torch.device) -> list[LaunchKey]:
    """What the call's launches ask with, also where the first guess is then refused: another tiling may not be."""
    x = call.spec.make()
    with torch.no_grad(), asked(device) as keys:
        try:
            call.spec.caller(call.make(), x)()
        except Exception as e:
            _still_there(device, e)
            if not keys:
                raise
    return keys


def _compilations(
    wanted: Sequence[tuple[FusedCall, list[LaunchKey]]], tried: Mapping[LaunchKey, Sequence[Tiling]]
) -> list[Compilation]:
    """All that can be compiled without data; what runs under autocast as what it is converted to."""
    found = []
    for call, keys in wanted:
        auto, spec = call.spec.autocast, call.spec
        module = without_data(call.make(), auto)
        if module is not None:
            spec = replace(spec, dtype=auto or spec.dtype, autocast=None)
            found += [Compilation(module, spec, key, tiling) for key in keys for tiling in tried[key]]
    return found


class _Checked:
    """A call with as many copies of its tensors as empty the caches, and what its results may be off by."""

    def __init__(self, call: FusedCall, on: TuningDevice) -> None:
        self.name, self._call, self._on = call.name, call, on
        x, module = call.spec.make(), call.make()
        with torch.no_grad():
            off = torch.autocast(x.device.type, enabled=False)
            with off, torch.backends.cudnn.flags(enabled=True, benchmark=False):  # no search for float64
                self._exact = [y.double() for y in call.exact(x.double())]
            plain = self._errors(call.spec.caller(call.plain, x)())
        if not all(map(math.isfinite, plain)):
            raise ArithmeticError("two library calls give NaN or infinity in this type")
        eps = torch.finfo(x.dtype).eps
        count = len(self._exact)  # errors in norm come first; a single value may be rounded by eps
        least = [eps / 4] * count + [eps] * count
        self._allowed = [ALLOWED * max(both) for both in zip(plain, least, strict=True)]
        size = sum(t.numel() * t.element_size() for t in (x, *module.parameters(), *module.buffers()))
        self._sets = [(module, x)]
        for _ in range(copies_for(size, on.device) - 1):
            self._sets.append((copy.deepcopy(module), x.clone()))

    def _errors(self, outputs: Sequence[Tensor]) -> list[float]:
        """Of every output in norm, then by its worst value, relative to the exact one's."""
        errors = []
        for order in (2, math.inf):
            for y, exact in zip(outputs, self._exact, strict=True):
                size = float(torch.linalg.vector_norm(exact, order)) or 1.0
                errors.append(float(torch.linalg.vector_norm(y.double() - exact, order)) / size)
        return errors

    def prepared(self, tilings: Mapping[LaunchKey, Tiling]) -> Prepared:
        """The calls with these tilings; the first guess for launches that are not among them."""

        def run(tensors: tuple[nn.Module, Tensor]) -> list[Tensor]:
            module, x = tensors
            y = self._call.spec.caller(module, x)()
            return [y] if isinstance(y, Tensor) else list(y)

        with torch.no_grad(), using(self._on.device, tilings):
            return self._on.prepare(run, self._sets)

    def error(self, prepared: Prepared) -> float:
        """The largest relative error in norm of several runs; ArithmeticError for results that are not right."""
        worst = 0.0
        for _ in range(RUNS_COMPARED):
            for y in (y for outputs in prepared.outputs for y in outputs):
                y.fill_(math.nan)
            with torch.no_grad():
                again = prepared.run()  # a graph writes the same outputs again, and returns nothing
            for outputs in again if isinstance(again, list) else prepared.outputs:
                errors = self._errors(outputs)
                if not all(e <= allowed for e, allowed in zip(errors, self._allowed, strict=True)):
                    raise ArithmeticError(f"errors {errors} are not within {self._allowed}")
                worst = max(worst, *errors[: len(self._exact)])
        return worst


def _tune(
    call: FusedCall, keys: Sequence[LaunchKey], tried: Mapping[LaunchKey, Sequence[Tiling]],
    known_faults: Mapping[tuple[LaunchKey, Tiling], str], on: TuningDevice,
) -> list[TunedRow]:  # fmt: skip
    """The launches of one call, one after another: each with the others as they are by then."""
    checked, rows = _Checked(call, on), list[TunedRow]()
    best: dict[LaunchKey, Tiling] = {}
    for key in keys:
        faults = {t: fault for (k, t), fault in known_faults.items() if k == key}
        found, timed = _halved(key, [t for t in tried[key] if t not in faults], faults, checked, best, on)
        if found.tiling is not None:
            best[key] = found.tiling
        for tiling, fault in faults.items():
            _LOG.info("%s: %s of %s is left out: %s", call.name, tiling, key, fault)
        rows.append(TunedRow(call.name, key, found, timed, faults))
    keep_tilings(on.device, {row.key: row.found for row in rows})
    return rows


def _halved(
    key: LaunchKey, tilings: Sequence[Tiling], faults: dict[Tiling, str], checked: _Checked,
    others: Mapping[LaunchKey, Tiling], on: TuningDevice,
) -> tuple[Measured, int]:  # fmt: skip
    """The fastest tiling, or the first guess unless one is clearly faster, and how many were timed."""
    guess, errors, left = None, dict[Tiling | None, float](), list(tilings)
    try:
        guess = checked.prepared(others)
        errors[None] = checked.error(guess)
    except ArithmeticError as e:
        raise ArithmeticError(f"the fused kernel is wrong with its first guess of tile sizes: {e}") from e
    except Exception as e:  # too large for this device, for example: another tiling may not be
        _still_there(on.device, e)
        _LOG.info("%s: the first guess of %s cannot be launched: %s", checked.name, key, e)
    for samples in SAMPLES:
        times: dict[Tiling | None, float] = {None: math.inf}
        if guess is not None:
            times[None] = on.microseconds(guess, key, None, samples)
        for tiling in left:
            try:
                prepared = checked.prepared({**others, key: tiling})
                if tiling not in errors:
                    errors[tiling] = checked.error(prepared)
                times[tiling] = on.microseconds(prepared, key, tiling, samples)
            except Exception as e:  # what the compiler, the driver or the comparison say of this tiling
                faults[tiling] = f"{type(e).__name__}: {e}"[:300]
                _still_there(on.device, e)
        ranked = sorted((t for t in left if t in times), key=lambda t: times[t])
        left = ranked[: max(FINALISTS, math.ceil(len(ranked) / 2)) if samples == SAMPLES[0] else FINALISTS]
    best = left[0] if left and times[left[0]] <= CLEARLY_FASTER * times[None] else None
    if best not in errors:
        raise RuntimeError(f"no tiling of {key} runs: {next(iter(faults.values()), 'there is none to try')}")
    guess_us = times[None] if None in errors else None
    return Measured(best, times[best], guess_us, errors[best]), len([t for t in errors if t is not None])


def _still_there(device: torch.device, cause: Exception) -> None:
    """Raises the cause where it has left the device unusable."""
    try:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    except RuntimeError as lost:
        raise lost from cause
