"""Mixtures of experts of transformers, opened so that each expert's layers are decomposed."""

from .opening import open_experts

__all__ = ["open_experts"]
