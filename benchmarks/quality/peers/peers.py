"""The peers as functions of a setting, a share and what they share of statistics: a model with low-rank layers."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

import alds_fast as alds

from .formulas import Factors, anchored, from_outputs, row_weighted, scaled, updated, whitened
from .layers import low_rank, rank_at, wide_weight
from .search import Sensitivities, ratios_within
from .sequential import compress_in_order
from .setting import Setting
from .statistics import Inputs

PASSES, RATE = 4, 5e-4  # of AA-SVD's refinement: times the size of SmolLM2's weights, .2, its 1e-4


def svd_llm(setting: Setting, share: float, inputs: Inputs) -> nn.Module:
    """Whitened SVD, the same share of every layer: :func:`.formulas.whitened`, SVD-LLM (W)."""
    return _by_layer(setting, share, lambda name, w, rank: whitened(w, inputs.second[name], rank))


def svd_llm_updated(setting: Setting, share: float, inputs: Inputs) -> nn.Module:
    """The same, then :func:`.formulas.updated` layer after layer on what the compressed layers before return."""
    small = svd_llm(setting, share, inputs)

    def solve(name: str, w: Tensor, cross: Tensor, second: Tensor) -> Factors:
        right = whitened(w, inputs.second[name], rank_at(setting.layers[name], share))[1]
        return updated(w, cross, second, right)

    compress_in_order(small, setting.model, setting.calibration, list(setting.layers), solve)
    return small


def swift_svd(setting: Setting, share: float, inputs: Inputs) -> nn.Module:
    """:func:`.formulas.from_outputs`, the same share of every layer.

    Swift-SVD's own allocation of ranks (by effective rank and a layer's importance) is not here: its rule is not in
    what we could read of the paper. E[y y^T] is made of E[x x^T], which comes to the same as summing it up.
    """
    return _by_layer(setting, share, lambda name, w, rank: from_outputs(w, inputs.second[name], rank))


def fwsvd(setting: Setting, share: float, fisher: dict[str, Tensor]) -> nn.Module:
    """:func:`.formulas.row_weighted`, the same share of every layer; without the paper's fine-tuning afterwards."""
    return _by_layer(setting, share, lambda name, w, rank: row_weighted(w, fisher[name], rank))


def asvd_uniform(setting: Setting, share: float, inputs: Inputs) -> nn.Module:
    """:func:`.formulas.scaled`, the same share of every layer."""
    return _by_layer(setting, share, lambda name, w, rank: scaled(w, inputs.size[name], rank))


def asvd(setting: Setting, share: float, inputs: Inputs, found: Sensitivities) -> nn.Module:
    """:func:`.formulas.scaled` with the ranks of ASVD's search, :mod:`.search`; layers without a cut stay dense."""
    ratios = ratios_within(found, setting.layers, share)
    factors = {
        name: scaled(wide_weight(layer), inputs.size[name], rank_at(layer, ratios[name]))
        for name, layer in setting.layers.items()
        if ratios[name] < 1
    }
    return low_rank(setting.model, factors)


def aa_svd(setting: Setting, share: float, inputs: Inputs) -> nn.Module:
    """:func:`.formulas.anchored` layer after layer, the same share of every layer."""
    small = svd_llm(setting, share, inputs)

    def solve(name: str, w: Tensor, cross: Tensor, second: Tensor) -> Factors:
        return anchored(w, cross, second, rank_at(setting.layers[name], share))

    compress_in_order(small, setting.model, setting.calibration, list(setting.layers), solve)
    return small


def aa_svd_refined(setting: Setting, share: float, small: nn.Module) -> nn.Module:
    """:func:`aa_svd` and blocks refined, by ``alds_fast.refine`` with AA-SVD's optimizer: AdamW, 1e-4, cosine.

    The authors refine a block before they compress the next, we after all are compressed: the blocks are trained in the
    same order and on the inputs that the refined ones before them give, but factors that they start from have not seen
    these. 4 passes of 56 steps of a window here, 25 of 8 steps of 32 windows there. Norms are trained along.
    """
    return alds.refine(small, setting.model, setting.calibration, epochs=PASSES, lr=RATE)[0]


def _by_layer(setting: Setting, share: float, factors: Callable[[str, Tensor, int], Factors]) -> nn.Module:
    make: dict[str, Factors] = {}
    for name, layer in setting.layers.items():
        make[name] = factors(name, wide_weight(layer), rank_at(layer, share))
    return low_rank(setting.model, make)
