"""Samples taken for all there is, for tests of formulas: no noise, none kept aside."""

from dataclasses import replace

from alds_fast import Analysis, analyze
from alds_fast.criteria import Moments


def without_noise(moments: Moments) -> Moments:
    """The moments as if they were those of all data."""
    return replace(moments, noise=0.0, gradient_noise=0.0, mean_noise=0.0)


def analyze_population(model, **options) -> Analysis:
    """An analysis for which the samples of ``data`` are all there is."""
    analysis = analyze(model, held_out=0, **options)
    return replace(analysis, moments={name: without_noise(m) for name, m in analysis.moments.items()})
