"""Marks of single sets of parameters."""

import pytest


def slow(*values):
    """Parameters of a test that ``make check`` leaves out."""
    return pytest.param(*values, marks=pytest.mark.slow)
