"""How far off a result is, and how far off sums in sequence may be."""

import torch


def error(result, reference):
    return float((result.double() - reference).norm() / reference.norm())


def sequential_rounding(*terms):
    """Relative error to expect of float32 sums of so many random terms each, added one after the other.

    The k-th partial sum is about sqrt(k / K) of the last one, and rounding it adds a uniform error of variance
    eps^2 / 12 of its square: sqrt(sum_k eps^2 / 12 * k / K) = eps * sqrt(K / 24), for each product in turn.
    """
    return torch.finfo(torch.float32).eps * (sum(terms) / 24) ** 0.5
