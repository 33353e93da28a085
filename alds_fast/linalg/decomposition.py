"""The decomposition of one layer: its fold, its number of channel slices and the rank of each slice."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from ..errors import ArgumentError
from .folding import WeightShape, distinct_schemes, divisors, factor_shapes, max_rank, params_per_rank


class Decomposition(NamedTuple):
    """What replaces a dense weight: an encoder and a decoder, see :mod:`alds_fast.linalg.folding`.

    >>> Decomposition(scheme=0, groups=2, rank=8).check(WeightShape(32, 64)).params(WeightShape(32, 64))
    1024
    """

    scheme: int
    groups: int
    rank: int

    @property
    def fold(self) -> tuple[int, int]:
        """(scheme, groups), by which spectra and errors are named."""
        return self.scheme, self.groups

    def check(self, shape: WeightShape) -> Decomposition:
        """This decomposition; ArgumentError, with the allowed values, if a weight of that shape does not have it."""
        distinct_schemes((self.scheme,), shape.kernel)
        if type(self.groups) is not int or self.groups < 1 or shape.slice_channels % self.groups:
            allowed = ", ".join(map(str, divisors(shape.slice_channels)))
            raise ArgumentError(
                f"groups={self.groups!r} does not divide its {shape.slice_channels} channels; allowed: {allowed}"
            )
        full = max_rank(shape, *self.fold)
        if type(self.rank) is not int or not 1 <= self.rank <= full:
            raise ArgumentError(
                f"rank={self.rank!r} is outside 1..{full} for scheme={self.scheme}, groups={self.groups}"
            )
        return self

    def params(self, shape: WeightShape) -> int:
        """Parameters of encoder and decoder."""
        return self.rank * params_per_rank(shape, *self.fold)

    def factor_shapes(self, shape: WeightShape) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Weight shapes of the encoder and the decoder."""
        return factor_shapes(shape, *self)

    def to_dict(self) -> dict[str, int]:
        """The three numbers by name, as files hold them."""
        return self._asdict()

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> Decomposition:
        """Read what :meth:`to_dict` gives, other fields ignored; ValueError unless they are integers."""
        numbers = [fields.get(name) for name in cls._fields]
        if not all(type(n) is int for n in numbers):
            raise ValueError(f"scheme, groups and rank are {numbers}, not three integers")
        return cls(*numbers)  # type: ignore[arg-type]

    def __str__(self) -> str:
        return f"scheme={self.scheme}, groups={self.groups}, rank={self.rank}"
