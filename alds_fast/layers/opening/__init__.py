"""Modules that hold several weights, or one in a way of their own, opened: the same function out of torch's layers.

Here belongs what a kind of module is opened to, a file each, and the opening of a model. Mixtures of experts belong in
experts.
"""

from .attention import OpenedAttention
from .opened_model import opened, opened_for, put_opened, why_closed
from .openers import REGISTERED, register

__all__ = ["REGISTERED", "OpenedAttention", "opened", "opened_for", "put_opened", "register", "why_closed"]
