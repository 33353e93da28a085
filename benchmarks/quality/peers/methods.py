"""Every method by name: what statistics it needs, which method it goes on from, and how it makes its model."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from alds_fast.files import write_text

from . import ours, peers
from .search import Sensitivities, sensitivities
from .setting import Setting
from .statistics import fisher_rows, input_moments

Get = Callable[[str], Any]  # other statistics by name
WINDOWS = 2  # that ASVD's search measures perplexities on


@dataclass(frozen=True)
class Method:
    """``build(setting, share, *statistics, *[model of after])``; a statistic stands behind those that it is made of."""

    build: Callable[..., nn.Module]
    needs: tuple[str, ...] = ()
    after: str | None = None


def _inputs(setting: Setting, folder: Path, get: Get) -> Any:
    return input_moments(setting.model, setting.calibration, list(setting.layers))


def _fisher(setting: Setting, folder: Path, get: Get) -> Any:
    return fisher_rows(setting.model, setting.calibration, list(setting.layers))


def _search(setting: Setting, folder: Path, get: Get) -> Sensitivities:
    """Kept in the folder, as it takes longest."""
    file = folder / f"search-{setting.digest()}.json"
    if file.exists():
        kept = json.loads(file.read_text())
        return {name: {float(r): ppl for r, ppl in by_ratio.items()} for name, by_ratio in kept.items()}
    windows = torch.cat(setting.calibration[:: len(setting.calibration) // WINDOWS][:WINDOWS])
    found = sensitivities(setting.model, windows, setting.layers, get("inputs").size)
    write_text(file, json.dumps(found))
    return found


def _analysis(setting: Setting, folder: Path, get: Get) -> Any:
    return ours.analysis(setting)


def _curves(criterion: str, setting: Setting, folder: Path, get: Get) -> Any:
    return ours.with_curves(setting, get("analysis"), criterion)


STATISTICS: dict[str, Callable[[Setting, Path, Get], Any]] = {
    "inputs": _inputs,
    "fisher": _fisher,
    "search": _search,
    "analysis": _analysis,
    "output curves": partial(_curves, "output"),
    "sensitivity curves": partial(_curves, "sensitivity"),
}
OUTPUT, SENSITIVITY = ("analysis", "output curves"), ("analysis", "sensitivity curves")

_PIVOTS = {"criterion": "sensitivity", "pivots": True}

METHODS: dict[str, Method] = {
    "FWSVD": Method(peers.fwsvd, ("fisher",)),
    "ASVD, uniform": Method(peers.asvd_uniform, ("inputs",)),
    "ASVD": Method(peers.asvd, ("inputs", "search")),
    "SVD-LLM": Method(peers.svd_llm, ("inputs",)),
    "Swift-SVD": Method(peers.swift_svd, ("inputs",)),
    "SVD-LLM, updated": Method(peers.svd_llm_updated, ("inputs",)),
    "AA-SVD, layers alone": Method(peers.aa_svd, ("inputs",)),
    "AA-SVD": Method(peers.aa_svd_refined, after="AA-SVD, layers alone"),
    "ours, output": Method(partial(ours.planned, criterion="output", pivots=False), OUTPUT),
    "ours, sensitivity": Method(partial(ours.planned, criterion="sensitivity", pivots=False), SENSITIVITY),
    "ours, with pivots": Method(partial(ours.planned, **_PIVOTS), SENSITIVITY),
    "ours, refitted": Method(partial(ours.planned, **_PIVOTS, refit=True), SENSITIVITY),
    "ours, refined": Method(ours.refined, after="ours, refitted"),
    "ours, tuned": Method(ours.tuned, after="ours, refined"),
    "ours, fewer units": Method(partial(ours.planned, **_PIVOTS, hidden_units=True), SENSITIVITY),
    "ours, fewer units, refined": Method(ours.refined, after="ours, fewer units"),
    "ours, fewer units, tuned": Method(ours.tuned_on_own_text, after="ours, fewer units, refined"),
}
