"""Matrices of many kinds, and what float32 spectra of them must keep to."""

import torch

from alds_fast.allocation import float32_check

KINDS = ("flat", "falling", "outlier", "low rank", "columns", "rows", "heavy", "zero slice")
BIASED = ("rank one", "rank one slice", "constant rows", "constant and noise", "repeated", "signs", "ternary")


def weight(kind, batch, rows, cols):
    w = torch.randn(batch, rows, cols)
    if kind == "falling":
        u, s, v = torch.linalg.svd(w, full_matrices=False)
        return (u / torch.arange(1, s.shape[-1] + 1)) @ v
    if kind == "outlier":
        return w + 3 * torch.randn(batch, rows, 1) @ torch.randn(batch, 1, cols)
    if kind == "low rank":
        return torch.randn(batch, rows, max(1, rows // 8)) @ torch.randn(batch, max(1, rows // 8), cols) + 0.01 * w
    if kind == "columns":
        return w * torch.logspace(0, -4, cols)
    if kind == "rows":
        return w * torch.logspace(0, -4, rows)[:, None]
    if kind == "heavy":
        return torch.distributions.StudentT(2.0).sample((batch, rows, cols))
    if kind == "rank one":
        return torch.randn(batch, rows, 1) @ torch.randn(batch, 1, cols)
    if kind == "rank one slice":
        return torch.cat([torch.randn(batch, rows, 1) @ torch.randn(batch, 1, cols // 2), 0.1 * w[..., cols // 2 :]], 2)
    if kind == "constant rows":
        return torch.randn(batch, rows, 1).expand(batch, rows, cols).contiguous()
    if kind == "constant and noise":
        return torch.cat([torch.randn(batch, rows, 1).expand(batch, rows, cols // 2), w[..., cols // 2 :]], 2)
    if kind == "repeated":
        return w[..., : max(1, cols // 64)].repeat_interleave(64, -1)[..., :cols].contiguous()
    if kind == "signs":
        return torch.where(w > 0, 1.0, -1.0) * torch.randn(batch, rows, 1)
    if kind == "ternary":
        return w.round().clamp(-1, 1) * torch.randn(batch, rows, 1)
    if kind == "zero slice":
        w[..., : cols // 2] = 0
    return w


def squared_errors(values):
    """Squared error of every rank over ||W||^2."""
    tails = values.square().flatten(0, -2).sum(0).flip(0).cumsum(0).flip(0)
    return tails / tails[0]


def check_band(matrix, groups, values, expected):
    assert values.dtype == torch.float64 and (values.diff(dim=-1) <= 0).all()
    norms = matrix.double().unflatten(2, (groups, -1)).square().sum((1, 3))
    torch.testing.assert_close(values.square().sum(-1), norms, rtol=1e-12, atol=0)
    exact = squared_errors(expected)
    assert (squared_errors(values) - exact).abs().max() <= float32_check.TAIL
    steps = (values.square() - expected.square()).flatten(0, -2).sum(0).abs()
    limit = float32_check.VALUE * (expected * expected[..., :1]).flatten(0, -2).sum(0)
    ranks = range(expected.shape[-1])
    assert all(steps[j] <= limit[j] or float32_check.too_small(expected, j) for j in ranks)
