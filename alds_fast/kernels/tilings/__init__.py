"""Tilings that were measured on a device: launches take them instead of their first guess.

Here belongs what a launch asks and what is kept. How tilings are found belongs in tuning, which alone writes them.
"""

from .keys import ConvKey, DecodeKey, EncodeKey, LaunchKey, LinearKey, Measured, Tiling, can_go_by_rows
from .tables import any_tuned, asked, capability_of, compiling_for, keep_tilings, measured, tables_changed, tuned, using

__all__ = [
    "ConvKey",
    "DecodeKey",
    "EncodeKey",
    "LaunchKey",
    "LinearKey",
    "Measured",
    "Tiling",
    "any_tuned",
    "asked",
    "can_go_by_rows",
    "capability_of",
    "compiling_for",
    "keep_tilings",
    "measured",
    "tables_changed",
    "tuned",
    "using",
]
