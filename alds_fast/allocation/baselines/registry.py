"""The baselines by name, each with what is true of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ...criteria import LayerSpectra
from ..candidates import Candidates
from .paper_search import alds_heuristic
from .rules import l_rank, least_sum, pca, svd, svd_energy, svd_nuclear, uniform


@dataclass(frozen=True)
class Baseline:
    """A rule (candidates and spectra of the layers, budget) -> the candidates taken, and what is true of it.

    ``one_slice``: it uses the encode fold with one slice. ``criterion``: the one that it is reported by, if no other is
    asked for. ``needs_data``: it goes by the outputs' covariances, and takes no other criterion.
    """

    rule: Callable[[Sequence[Candidates], Sequence[LayerSpectra], int], list[int]]
    one_slice: bool = False
    criterion: str | None = None
    needs_data: bool = False


def _alds_heuristic(layers: Sequence[Candidates], spectra: Sequence[LayerSpectra], budget: int) -> list[int]:
    """``alds-heuristic``: :func:`alds_fast.allocation.baselines.paper_search.alds_heuristic`."""
    return alds_heuristic(layers, budget)


BASELINES = {
    "alds-heuristic": Baseline(_alds_heuristic),
    "svd": Baseline(svd, one_slice=True, criterion="frobenius"),
    "svd-energy": Baseline(svd_energy, one_slice=True, criterion="frobenius"),
    "svd-nuclear": Baseline(svd_nuclear, one_slice=True, criterion="frobenius"),
    "l-rank": Baseline(l_rank, one_slice=True, criterion="frobenius"),
    "sum": Baseline(least_sum),
    "uniform": Baseline(uniform),
    "pca": Baseline(pca, one_slice=True, criterion="output", needs_data=True),
}
