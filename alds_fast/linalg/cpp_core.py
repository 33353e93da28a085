"""Calling the C++ core: one BLAS thread, arguments checked, refusals named, and when to go past the dispatcher."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import ModuleType

import threadpoolctl
import torch
from torch import Tensor

from ..errors import ArgumentError, DependencyError


@functools.cache
def core() -> ModuleType:
    """The C++ extension, loaded when it is first used; DependencyError where it was not built."""
    try:
        return importlib.import_module("._core", __package__)
    except ImportError as e:
        raise DependencyError(
            f"the C++ core cannot be loaded beside {__file__!r} ({e}): in a source tree it is not built by "
            f"'pip install .'; start Python in another directory, or build it here by 'pip install -e .'"
        ) from e


@functools.cache
def _blas() -> threadpoolctl.ThreadpoolController:
    for name in ("cython_blas", "cython_lapack"):  # what the core calls; only a BLAS that is loaded is found
        importlib.import_module(f"scipy.linalg.{name}")
    return threadpoolctl.ThreadpoolController().select(user_api="blas")


@contextmanager
def one_blas_thread() -> Iterator[None]:
    """The core calls LAPACK from many threads; BLAS itself must not start more."""
    with _blas().limit(limits=1):
        yield


@contextmanager
def refusals() -> Iterator[None]:
    """What the core refuses (values that are not finite, sizes beyond its LAPACK) is a bad argument."""
    try:
        yield
    except (ValueError, RuntimeError) as e:
        raise ArgumentError(f"matrices: {e}") from e


def check_matrices(matrices: Sequence[Tensor], groups: Sequence[Sequence[int]]) -> None:
    """ArgumentError unless these are batches of float matrices and numbers of slices that divide their columns."""
    if len(matrices) != len(groups):
        raise ArgumentError(f"groups: {len(groups)} entries for {len(matrices)} matrices")
    for i, (m, ks) in enumerate(zip(matrices, groups, strict=True)):
        if m.dim() != 3 or m.numel() == 0:
            raise ArgumentError(f"matrices[{i}]: expected non-empty (batch, rows, cols), got shape {tuple(m.shape)}")
        if m.dtype not in (torch.float32, torch.float64):
            raise ArgumentError(f"matrices[{i}]: expected float32 or float64, got {m.dtype}")
        for k in ks:
            if k < 1 or m.shape[2] % k:
                raise ArgumentError(f"groups[{i}]: {k} does not divide the {m.shape[2]} columns")


def arrays(tensors: Sequence[Tensor]) -> list:
    """The tensors as contiguous numpy arrays, without a copy where they are contiguous."""
    return [t.detach().contiguous().numpy() for t in tensors]


def implementation(tensors: Sequence[Tensor], operator: Callable, by_device: dict[str, Callable]) -> Callable:
    """The operator, or for plain tensors outside of tracing the very function that it would call on their device.

    (The first call of a custom operator imports torch._dynamo, more than a second.)
    """
    devices = {t.device.type for t in tensors if type(t) in (Tensor, torch.nn.Parameter)}
    plain = len(devices) == 1 and all(type(t) in (Tensor, torch.nn.Parameter) for t in tensors)
    return operator if torch.compiler.is_compiling() or not plain else by_device.get(next(iter(devices)), operator)
