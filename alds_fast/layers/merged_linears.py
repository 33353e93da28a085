"""Horizontal merging: low-rank linear layers that read the same input (q/k/v, gate/up) share one encoder call."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ArgumentError
from ..kernels import lowrank_linear, lowrank_linears, why_not_fused_linears
from .linear import LowRankLinear
from .low_rank import Int8LowRankLinear


class MergedLinears(nn.Module):
    """Several low-rank linear layers with ``groups=1`` that read the same x: a list of their outputs.

    ``encoder`` (sum of ranks, in_features) holds their encoders one after the other; ``decoders`` are (f_i, rank_i).
    The factors are copied, identities of pivots filled in. Raises ArgumentError for layers that do not read the same
    features or have slices, or of which some have int8 factors.

    >>> merged = MergedLinears([LowRankLinear(16, 8, 2), LowRankLinear(16, 4, 3)])
    >>> [y.shape[1] for y in merged(torch.ones(5, 16))]
    [8, 4]
    """

    def __init__(self, layers: Sequence[LowRankLinear], backend: str = "auto") -> None:
        super().__init__()
        if not layers or len({layer.weight_shape.in_channels for layer in layers}) > 1:
            raise ArgumentError("the layers to merge do not read the same number of features")
        if any(layer.slices != 1 for layer in layers):
            raise ArgumentError(f"layers with channel slices cannot be merged: groups={[la.slices for la in layers]}")
        encoders, decoders = self._factors_of(layers)
        trained = any(layer.encoder.requires_grad for layer in layers)
        self.encoder = nn.Parameter(torch.cat(encoders).detach(), trained)
        self.decoders = nn.ParameterList(
            nn.Parameter(decoder.detach().clone(), layer.decoder.requires_grad)
            for layer, decoder in zip(layers, decoders, strict=True)
        )
        for i, layer in enumerate(layers):
            self.register_parameter(f"bias{i}", copy.deepcopy(layer.bias))  # type: ignore[arg-type]
        self.backend = backend
        self._last: tuple[Tensor, tuple, dict[int, Tensor]] | None = None

    def _factors_of(self, layers: Sequence[LowRankLinear]) -> tuple[list[Tensor], list[Tensor]]:
        """Encoders and decoders without pivots; scales of int8 ones become buffers."""
        self.is_int8 = any(isinstance(layer, Int8LowRankLinear) for layer in layers)
        if not self.is_int8:
            plain = [layer.plain_factors() for layer in layers]
            return [encoder for encoder, _ in plain], [decoder for _, decoder in plain]
        int8 = [layer for layer in layers if isinstance(layer, Int8LowRankLinear)]
        if len(int8) < len(layers):
            raise ArgumentError(f"{len(layers) - len(int8)} of {len(layers)} layers to merge have no int8 factors")
        parts = [layer.merged_parts() for layer in int8]
        self.register_buffer("encoder_scale", torch.cat([scale for _, scale, _, _ in parts]))
        for i, (_, _, _, scale) in enumerate(parts):
            self.register_buffer(f"decoder_scale{i}", scale.clone())
        return [encoder for encoder, _, _, _ in parts], [decoder for _, _, decoder, _ in parts]

    def _scales(self) -> list[Tensor]:
        """Of the encoder's rows and of every decoder's; nothing without int8."""
        names = ["encoder_scale", *(f"decoder_scale{i}" for i in range(len(self.decoders)))]
        return [self.get_buffer(name) for name in names] if self.is_int8 else []

    def forward(self, x: Tensor) -> list[Tensor]:
        biases = [getattr(self, f"bias{i}") for i in range(len(self.decoders))]
        scales = self._scales() or None
        return lowrank_linears(x, self.encoder, list(self.decoders), biases, scales=scales, backend=self.backend)

    def why_not_fused(self, x: Tensor) -> str | None:
        """Why the fused kernels cannot run these layers on ``x``; None if they can."""
        return why_not_fused_linears(x, len(self.decoders))

    def part(self, x: Tensor, index: int) -> Tensor:
        """Output ``index``; all are computed when the first is asked for, and each is handed out once.

        The others' outputs are used if they are asked for with the very same tensor and neither it nor the factors have
        changed since (by their version counters, which a change through ``.data`` or numpy does not move). With
        gradients, under torch.compile and for tensors of ``torch.inference_mode``, which have no such counters, every
        output is computed by itself.
        """
        if torch.is_grad_enabled() or torch.compiler.is_compiling() or x.is_inference() or self.encoder.is_inference():
            return self._alone(x, index)
        kind = x.device.type
        state = (
            x._version,
            torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind),
            *(p._version for p in self.parameters()),
        )
        last = self._last
        outputs = last[2] if last is not None and last[0] is x and last[1] == state else {}
        y = outputs.pop(index, None)
        if y is None:
            outputs = dict(enumerate(self(x)))
            y = outputs.pop(index)
        self._last = (x, state, outputs) if outputs else None
        return y

    def _alone(self, x: Tensor, index: int) -> Tensor:
        decoders = list(self.decoders)
        begin, decoder = sum(d.shape[1] for d in decoders[:index]), decoders[index]
        run = slice(begin, begin + decoder.shape[1])
        scales = (all_scales[0][run], all_scales[1 + index]) if (all_scales := self._scales()) else None
        backend = "two-op" if self.backend == "two-op" else "fused-first" if "fused" in self.backend else "auto"
        bias = getattr(self, f"bias{index}")
        return lowrank_linear(x, self.encoder[run], decoder, bias, scales=scales, backend=backend)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_last": None}

    def extra_repr(self) -> str:
        sizes = [f"{d.shape[0]} (rank {d.shape[1]})" for d in self.decoders]
        text = f"in_features={self.encoder.shape[1]}, out_features={', '.join(sizes)}, backend={self.backend!r}"
        return text + ", int8" * self.is_int8


class MergedPart(nn.Module):
    """Stands in the place of one of the layers of a :class:`MergedLinears`."""

    def __init__(self, merged: MergedLinears, index: int) -> None:
        super().__init__()
        self.merged, self.index = merged, index

    @property
    def in_features(self) -> int:
        """As of ``nn.Linear``."""
        return self.merged.encoder.shape[1]

    @property
    def out_features(self) -> int:
        """As of ``nn.Linear``."""
        return self.merged.decoders[self.index].shape[0]

    def forward(self, input: Tensor) -> Tensor:
        return self.merged.part(input, self.index)

    def extra_repr(self) -> str:
        return f"index={self.index}"
