"""The language model's task, without a download."""

import doctest
import gzip
import math
from types import SimpleNamespace

import pytest
import torch

from benchmarks.quality import language


class Uniform(torch.nn.Module):
    def forward(self, tokens):
        return SimpleNamespace(logits=torch.zeros(*tokens.shape, 50))


def test_documents_are_read():
    assert doctest.testmod(language).failed == 0


def test_perplexity_is_that_of_the_tokens_but_the_first():
    tokens = torch.randint(50, (6, 20), generator=torch.Generator().manual_seed(0))
    assert language.perplexity(Uniform(), tokens) == pytest.approx(50, rel=1e-5)


def test_squared_distances_of_roots_are_the_divergence():
    """Twice KL(p || q) = 4 sum (sqrt p - sqrt q)^2 to leading order."""
    torch.manual_seed(0)
    z = torch.randn(40, dtype=torch.float64)
    moved = z + 1e-3 * torch.randn(40, dtype=torch.float64)
    p, q = (language.roots_of_probabilities(SimpleNamespace(logits=x), None) for x in (z, moved))
    divergence = float((p.square() * (p.square().log() - q.square().log())).sum())
    assert math.isclose(2 * divergence, 4 * float((p - q).square().sum()), rel_tol=1e-2)


def test_texts_may_be_compressed(tmp_path):
    (tmp_path / "a.txt").write_text("plain")
    (tmp_path / "b.txt.gz").write_bytes(gzip.compress(b"packed"))
    assert [language.read_text(tmp_path / name) for name in ("a.txt", "b.txt.gz")] == ["plain", "packed"]
