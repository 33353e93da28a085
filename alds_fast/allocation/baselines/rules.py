"""Other ways to share one budget among the layers, to compare the exact allocator against.

Every baseline gets the layers' candidates with their costs under the budget, the layers' singular values, and what the
layers may cost together; it returns the candidate that each layer takes, never above the budget. the registry has them
by name.

Most are rules of one parameter: every layer has a chain of points of rising cost and takes the last one whose level is
at most t, which is the same for all layers and the largest that meets the budget. What such a rule leaves of the
budget is not spent. A layer in which the rule's rank saves nothing stays dense. Under ``align`` the ranks to choose
among are its multiples.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ...criteria import LayerSpectra
from ...errors import ArgumentError, unreachable
from ..candidates import Candidates
from ..one_budget import allocate
from ..pareto import Floats, Ints, _lower_hull, pareto_front
from .pca import pca_ranks


@dataclass(frozen=True)
class Chain:
    """Points of a layer: ``levels`` and ``costs`` ascending, ``index`` their candidates.

    A point is taken from its level on until the next; the first one below its level, too. One whose level is infinite
    never is.
    """

    levels: Floats
    costs: Ints
    index: Ints

    def point(self, level: float) -> int:
        """Number of the point taken at ``level``."""
        return max(int(np.searchsorted(self.levels, level, side="right")) - 1, 0)


def common_level(chains: Sequence[Chain], budget: int) -> list[int]:
    """The candidates at the largest level, one for all chains, at which they cost at most ``budget`` together.

    Raises BudgetError if even the first points cost more.
    """
    least = sum(int(c.costs[0]) for c in chains)
    if least > budget:
        raise unreachable(budget, least)
    levels = np.unique(np.concatenate([[-np.inf], *(c.levels[c.levels < np.inf] for c in chains)]))
    low, high = 0, len(levels) - 1  # at levels[low] the budget is met, above levels[high] it is not
    while low < high:
        middle = (low + high + 1) // 2
        met = sum(int(c.costs[c.point(levels[middle])]) for c in chains) <= budget
        low, high = (middle, high) if met else (low, middle - 1)
    return [int(c.index[c.point(levels[low])]) for c in chains]


def _by_rank(layer: Candidates, levels: Floats) -> Chain:
    """The ranks of a layer's one curve that cost less than dense, then dense; levels[i] is that of its i-th rank."""
    costs = layer.costs
    saving = int((costs[:-1] < layer.dense_cost).sum())
    index = np.append(np.arange(saving), len(costs) - 1)
    return Chain(levels[: saving + 1], costs[index], index)


def _align(layer: Candidates) -> int:
    return layer.curves[0].align if layer.curves else 1


def _tails(spectra: LayerSpectra, power: int) -> Floats:
    """sum_{l>j} s_l^power for j = 0..r of the encode fold with one slice."""
    values = spectra.values[0, 1].numpy()
    sums = (values**power).reshape(-1, values.shape[-1]).sum(0)
    return np.append(np.cumsum(sums[::-1])[::-1], 0.0)


def svd(layers: Sequence[Candidates], spectra: Sequence[LayerSpectra], budget: int) -> list[int]:
    """``svd``: the same relative rank in all layers, rank_i = max(1, floor(rho * full rank_i)), rho the largest.

    Truncated SVD of the f x (c k1 k2) matrices, as in Denton, Zaremba, Bruna, LeCun, Fergus, "Exploiting linear
    structure within convolutional networks for efficient evaluation", NeurIPS 2014.
    """
    chains = []
    for layer, spectrum in zip(layers, spectra, strict=True):
        full = spectrum.values[0, 1].shape[-1]
        ranks = _align(layer) * np.arange(1, len(layer.costs) + 1)
        chains.append(_by_rank(layer, np.minimum(ranks, full) / full))
    return common_level(chains, budget)


def _same_share(layers: Sequence[Candidates], spectra: Sequence[LayerSpectra], budget: int, power: int) -> list[int]:
    """The least ranks that keep the same share of sum_l s_l^power in all layers, the largest share."""
    chains = []
    for layer, spectrum in zip(layers, spectra, strict=True):
        tails = _tails(spectrum, power)
        lost = tails[:: _align(layer)][: len(layer.costs)] / (tails[0] or 1.0)
        # A rank is needed for larger shares than the rank before it keeps; where that keeps all, for none.
        chains.append(_by_rank(layer, np.where(lost > 0, -lost, np.inf)))
    return common_level(chains, budget)


def svd_energy(layers: Sequence[Candidates], spectra: Sequence[LayerSpectra], budget: int) -> list[int]:
    """``svd-energy``: the same share of Frobenius energy kept in all layers, the largest.

    rank_i is the least j with sum_{l<=j} s_l^2 / sum_l s_l^2 >= share. Alvarez and Salzmann, "Compression-aware
    training of deep networks", NeurIPS 2017; Wen, Xu, Wu, Wang, Chen, Li, "Coordinating filters for faster deep neural
    networks", ICCV 2017.
    """
    return _same_share(layers, spectra, budget, 2)


def svd_nuclear(layers: Sequence[Candidates], spectra: Sequence[LayerSpectra], budget: int) -> list[int]:
    """``svd-nuclear``: the same share of the nuclear norm kept in all layers, the largest.

    rank_i is the least j with sum_{l<=j} s_l / sum_l s_l >= share. Alvarez and Salzmann, NeurIPS 2017, see
    :func:`svd_energy`.
    """
    return _same_share(layers, spectra, budget, 1)


def l_rank(layers: Sequence[Candidates], spectra: Sequence[LayerSpectra], budget: int) -> list[int]:
    """``l-rank``: least sum_i ||W_i - W_hat_i||_F^2 + lambda sum_i cost_i(rank_i), lambda the least meeting the budget.

    The errors are absolute. For every layer the minimiser moves along the lower convex hull of (cost, squared error)
    as lambda falls; a step is taken once lambda is at most its fall in error per cost. The compression step of
    Idelbayev and Carreira-Perpinan, "Low-rank compression of neural nets: learning the rank of each layer", CVPR 2020.
    """
    chains = []
    for layer, spectrum in zip(layers, spectra, strict=True):
        align = _align(layer)
        errors = np.append(_tails(spectrum, 2)[align::align][: len(layer.costs) - 1], 0.0)
        front = pareto_front(layer.costs, errors)
        hull = _lower_hull(front.costs.astype(np.float64), front.errors)
        costs = front.costs[hull]
        levels = np.append(-np.inf, np.diff(front.errors[hull]) / np.diff(costs))
        chains.append(Chain(levels, costs, front.index[hull]))
    return common_level(chains, budget)


def uniform(layers: Sequence[Candidates], spectra: Sequence[LayerSpectra], budget: int) -> list[int]:
    """``uniform``: the same share of every layer's own dense cost, the largest; within it the candidate of least error.

    A layer that has no candidate within its share takes its cheapest one.
    """
    fronts = [pareto_front(layer.costs, layer.errors) for layer in layers]
    shares = [f.costs / max(layer.dense_cost, 1) for f, layer in zip(fronts, layers, strict=True)]
    return common_level([Chain(s, f.costs, f.index) for s, f in zip(shares, fronts, strict=True)], budget)


def least_sum(layers: Sequence[Candidates], spectra: Sequence[LayerSpectra], budget: int) -> list[int]:
    """``sum``: least sum of squared relative errors over all candidates, as ``method="alds", p=2`` finds it.

    Exact Lagrangian relaxation, then a greedy fill: :func:`alds_fast.allocation.one_budget.least_p_norm`.
    """
    fronts = [pareto_front(layer.costs, layer.errors) for layer in layers]
    picks = allocate(fronts, budget, 2.0).picks
    return [int(f.index[i]) for f, i in zip(fronts, picks, strict=True)]


def pca_on(layers: Sequence[Candidates], eigenvalues: Sequence[Floats], budget: int) -> list[int]:
    """The candidates of :func:`alds_fast.allocation.baselines.pca.pca_ranks`.

    Under ``align`` eigenvalues are removed so many at a time.

    ``eigenvalues[i]`` of layer i: of the covariance of its output before the bias, descending.
    """
    blocks = [np.add.reduceat(e, np.arange(0, len(e), _align(c))) for c, e in zip(layers, eigenvalues, strict=True)]
    per_block = [int(layer.costs[0]) for layer in layers]  # that of dense where there is no other candidate
    ranks = pca_ranks(blocks, per_block, [layer.dense_cost for layer in layers], budget)
    chains = [_by_rank(layer, np.arange(1.0, len(layer.costs) + 1)) for layer in layers]
    return [int(chain.index[chain.point(rank)]) for chain, rank in zip(chains, ranks, strict=True)]


def pca(layers: Sequence[Candidates], spectra: Sequence[LayerSpectra], budget: int) -> list[int]:
    """``pca``: largest product of the layers' shares of kept output energy, by greedy removal of eigenvalues.

    See :func:`alds_fast.allocation.baselines.pca.pca_ranks`. Raises ArgumentError without the outputs' covariances.
    """
    eigenvalues = []
    for spectrum in spectra:
        if spectrum.output is None:
            raise ArgumentError("method='pca' needs data: analyze(model, data=batches)")
        eigenvalues.append(spectrum.output.numpy())
    return pca_on(layers, eigenvalues, budget)
