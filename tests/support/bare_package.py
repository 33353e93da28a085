"""Run a module with ``alds_fast`` as a bare package: its kernels need neither the C++ core nor numba or scipy.

``python -m support.bare_package MODULE [arguments]``, with the root and tests/ on the path. ``alds_fast/__init__.py``,
which imports every wing, is not executed; ``alds_fast.kernels`` and the leaves of the root are as always.
"""

import runpy
import sys
import types
from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[2] / "alds_fast"


def install():
    """Put the bare package where imports look first."""
    package = types.ModuleType("alds_fast")
    package.__path__ = [str(PACKAGE)]
    sys.modules["alds_fast"] = package
    from alds_fast.version import __version__

    package.__version__ = __version__


if __name__ == "__main__":
    install()
    del sys.argv[0]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
