"""Hypothesis runs without a deadline (this machine is shared) and with the same examples every time."""

from hypothesis import settings

settings.register_profile("alds_fast", deadline=None, derandomize=True, max_examples=60)
settings.load_profile("alds_fast")
