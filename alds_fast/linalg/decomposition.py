"""The decomposition of one layer: its fold, its number of channel slices and the rank of each slice."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from ..errors import ArgumentError
from .folding import WeightShape, distinct_schemes, divisors, factor_shapes, max_rank, params_per_rank
from .pivots import Pivots, index_count, pivots_of_fold, saved_by_pivots


class Decomposition(NamedTuple):
    """What replaces a dense weight: an encoder and a decoder, see :mod:`alds_fast.linalg.folding`.

    ``pivots``: "output" or "input" for factors of which an identity is not stored, see
    :mod:`alds_fast.linalg.pivots`; "" for plain ones.

    >>> Decomposition(scheme=0, groups=2, rank=8).check(WeightShape(32, 64)).params(WeightShape(32, 64))
    1024
    >>> Decomposition(scheme=0, groups=2, rank=8, pivots="input").params(WeightShape(32, 64))
    960
    """

    scheme: int
    groups: int
    rank: int
    pivots: Pivots = ""

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
        if self.pivots and (self.pivots != pivots_of_fold(shape, *self.fold) or not 0 < self.rank < self._side(shape)):
            allowed = pivots_of_fold(shape, *self.fold) or "none"
            raise ArgumentError(
                f"pivots={self.pivots!r} with rank={self.rank}: allowed for scheme={self.scheme}, groups={self.groups} "
                f"are {allowed}, of ranks below {self._side(shape)}"
            )
        return self

    def _side(self, shape: WeightShape) -> int:
        """Filters or channels, the pivots among them, of a slice."""
        return shape.filters_per_group if self.pivots == "output" else shape.slice_channels // self.groups

    def params(self, shape: WeightShape) -> int:
        """Parameters of encoder and decoder; indices of pivots count as such."""
        saved = saved_by_pivots(shape, self.groups, self.rank) if self.pivots else 0
        return self.rank * params_per_rank(shape, *self.fold) - saved + index_count(shape, self.pivots)

    def factor_shapes(self, shape: WeightShape) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Weight shapes of the encoder and the decoder."""
        encoder, decoder = factor_shapes(shape, *self.fold, self.rank)
        if self.pivots == "output":
            return encoder, (decoder[0] - shape.conv_groups * self.rank, *decoder[1:])
        if self.pivots == "input":
            return (encoder[0], encoder[1] - self.rank, *encoder[2:]), decoder
        return encoder, decoder

    def to_dict(self) -> dict[str, Any]:
        """By name, as files hold them; pivots only where there are any."""
        fields = self._asdict()
        return fields if self.pivots else {name: value for name, value in fields.items() if name != "pivots"}

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> Decomposition:
        """Read what :meth:`to_dict` gives, other fields ignored; ValueError unless they are of its types."""
        numbers = [fields.get(name) for name in ("scheme", "groups", "rank")]
        if not all(type(n) is int for n in numbers):
            raise ValueError(f"scheme, groups and rank are {numbers}, not three integers")
        pivots = fields.get("pivots") or ""
        if pivots not in ("", "output", "input"):
            raise ValueError(f"pivots are {pivots!r}, neither 'output' nor 'input'")
        scheme, groups, rank = numbers
        return cls(scheme, groups, rank, pivots)  # type: ignore[arg-type]

    def __str__(self) -> str:
        text = f"scheme={self.scheme}, groups={self.groups}, rank={self.rank}"
        return f"{text}, pivots={self.pivots!r}" if self.pivots else text
