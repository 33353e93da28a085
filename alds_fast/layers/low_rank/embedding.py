"""Low-rank tables: rows are looked up in a narrow table, and a decoder makes them as wide as they were.

A table of n rows of width d is a linear layer of n inputs, of which one is 1: its weight, filters first, is (d, n).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...errors import ArgumentError
from ...linalg import Decomposition, WeightShape
from ..base import LowRankLayer

_OPTIONS = ("padding_idx", "scale_grad_by_freq")


class LowRankEmbedding(LowRankLayer):
    """Embedding of rank ``rank``: indices of any shape (...) to (..., embedding_dim).

    encoder (rank, num_embeddings), whose columns are looked up, in memory one after the other; decoder
    (embedding_dim, rank). Fold 0 with one slice and no pivots. Raises ArgumentError for a rank outside
    1..min(num_embeddings, embedding_dim). There is no fused kernel: it runs as a look-up and a product.

    >>> table = LowRankEmbedding(100, 16, rank=4)
    >>> table(torch.tensor([[3, 7]])).shape, table.encoder.numel() + table.decoder.numel()
    (torch.Size([1, 2, 16]), 464)
    """

    dense_attributes: tuple[str, ...] = ("num_embeddings", "embedding_dim", *_OPTIONS)
    max_norm = None
    sparse = False
    _dense: Any = nn.Embedding
    _options: tuple[str, ...] = _OPTIONS

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        rank: int,
        *,
        scheme: int = 0,
        groups: int = 1,
        pivots: str = "",
        padding_idx: int | None = None,
        scale_grad_by_freq: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        if (scheme, groups, pivots) != (0, 1, ""):
            raise ArgumentError(f"a table has scheme=0, groups=1 and no pivots, not {scheme}, {groups}, {pivots!r}")
        shape = WeightShape(embedding_dim, num_embeddings)
        super().__init__(shape, Decomposition(0, 1, rank), False, device, dtype)
        self.padding_idx, self.scale_grad_by_freq = padding_idx, scale_grad_by_freq

    @property
    def num_embeddings(self) -> int:
        """As of the dense layer."""
        return self.weight_shape.in_channels

    @property
    def embedding_dim(self) -> int:
        """As of the dense layer."""
        return self.weight_shape.out_channels

    @property
    def stored_shape(self) -> tuple[int, ...]:
        """Shape of the weight as the dense module has it."""
        return self.num_embeddings, self.embedding_dim

    def as_stored(self, weight: Tensor) -> Tensor:
        """A weight with the filters first as the dense module has it, and the other way round."""
        return weight.mT

    @classmethod
    def shaped_like(cls, table: Any, decomposition: Decomposition) -> LowRankEmbedding:
        """The layer that replaces ``table``, its factors on the meta device."""
        options = {name: getattr(table, name) for name in cls._options} | decomposition.to_dict()
        return cls(table.num_embeddings, table.embedding_dim, **options, device="meta")

    @classmethod
    def from_dense(cls, table: Any, *, rank: int) -> LowRankEmbedding:
        """The layer of that rank whose table is nearest to that of ``table`` (Frobenius), of its type and device.

        Raises ArgumentError for any other type and as the constructor; WeightError for NaN or infinity.
        """
        if not isinstance(table, cls._dense):
            raise ArgumentError(f"from_dense takes an nn.{cls._dense.__name__}, got {type(table).__name__}")
        new = cls.shaped_like(table, Decomposition(0, 1, rank))
        new._take_factors_of(table)
        return new

    def set_factors(self, left: Tensor, right: Tensor, like: Tensor) -> None:
        """As of every low-rank layer; columns of the encoder lie one after the other."""
        super().set_factors(left, right, like)
        rows = self.encoder.detach().mT.contiguous()
        self.encoder = nn.Parameter(rows.mT, self.encoder.requires_grad)

    def forward(self, input: Tensor) -> Tensor:
        self._two_op(input)  # refuses proxies
        codes = F.embedding(input, self.encoder.mT, self.padding_idx, scale_grad_by_freq=self.scale_grad_by_freq)
        return F.linear(codes, self.decoder)

    def why_not_fused(self, x: Tensor) -> str | None:
        """That there is no kernel."""
        return "there is no kernel for tables"

    def dense_module(self) -> nn.Module:
        """The ``nn.Embedding`` or ``nn.EmbeddingBag`` that the layer stands for, on the meta device."""
        options = {name: getattr(self, name) for name in self._options}
        table: nn.Module = self._dense(self.num_embeddings, self.embedding_dim, **options, device="meta")
        return table

    def narrow_module(self) -> nn.Module:
        """The look-up as a module of torch, with a copy of the encoder."""
        options = {name: getattr(self, name) for name in self._options}
        table: nn.Module = self._dense(self.num_embeddings, self.rank, **options, device="meta")
        rows = self.encoder.detach().mT.clone(memory_format=torch.contiguous_format)
        table.weight = nn.Parameter(rows, self.encoder.requires_grad)
        return table

    def extra_repr(self) -> str:
        padding = "" if self.padding_idx is None else f", padding_idx={self.padding_idx}"
        return f"{self.num_embeddings}, {self.embedding_dim}{padding}, rank={self.rank}"


class LowRankEmbeddingBag(LowRankEmbedding):
    """Sums or means of rows of a low-rank table, as of ``nn.EmbeddingBag``: bags of narrow rows, then the decoder.

    >>> LowRankEmbeddingBag(100, 16, rank=4)(torch.tensor([[3, 7, 1]])).shape
    torch.Size([1, 16])
    """

    dense_attributes = ("num_embeddings", "embedding_dim", *_OPTIONS, "mode", "include_last_offset")
    _dense: Any = nn.EmbeddingBag
    _options = (*_OPTIONS, "mode", "include_last_offset")

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        rank: int,
        *,
        mode: str = "mean",
        include_last_offset: bool = False,
        **options: Any,
    ) -> None:
        if mode not in ("sum", "mean"):
            raise ArgumentError(f"mode={mode!r} is not 'sum' or 'mean', which alone go before a product")
        super().__init__(num_embeddings, embedding_dim, rank, **options)
        self.mode, self.include_last_offset = mode, include_last_offset

    def forward(self, input: Tensor, offsets: Tensor | None = None, per_sample_weights: Tensor | None = None) -> Tensor:
        self._two_op(input)
        codes = F.embedding_bag(
            input, self.encoder.mT.contiguous(), offsets, None, 2.0, self.scale_grad_by_freq, self.mode, False,
            per_sample_weights, self.include_last_offset, self.padding_idx,
        )  # fmt: skip
        return F.linear(codes, self.decoder)
