"""The options of analyze and Analysis.plan, with types, of functions that hand them on: editors complete these."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypedDict

from ...criteria import Groups
from ...measurement import Sensitivity
from ...progress import ProgressOption
from ...selection import Selection


class AnalysisOptions(TypedDict, total=False):
    """Of :func:`alds_fast.analyze`, but for ``example_inputs``."""

    schemes: Sequence[int]
    groups: Groups
    include: Selection
    exclude: Selection
    data: Iterable[Any] | None
    sensitivity: Sensitivity
    mask: str | None
    moment_order: int
    held_out: float
    moment_memory: int | None
    precision: str
    progress: ProgressOption


class PlanOptions(TypedDict, total=False):
    """Of :meth:`alds_fast.Analysis.plan`, but for budgets, ``example_inputs`` and ``progress``."""

    criterion: str | None
    p: float | None
    method: str
    align: int
    bias_correction: bool
    importance: Mapping[Any, float] | None
    cache: str | os.PathLike[str] | bool | None
    pivots: bool
    pins: Mapping[Any, Any] | None
    min_rank: int
    hidden_units: bool


class CompressOptions(AnalysisOptions, PlanOptions, total=False):
    """Those of both."""
