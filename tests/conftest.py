"""Hypothesis runs without a deadline (this machine is shared) and with the same examples every time.

Without a GPU the Triton kernels run under the interpreter, which must be chosen before triton is imported. With one,
cuDNN's float32 convolutions are kept from TensorFloat-32, torch's default there, which is 1000 times less precise: they
are what the kernels are compared with.
"""

import os

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
    from support import interpreter

    interpreter.mend()
else:
    torch.backends.cudnn.allow_tf32 = False

import pytest
from hypothesis import settings

from alds_fast.kernels import calls

settings.register_profile("alds_fast", deadline=None, derandomize=True, max_examples=60)
settings.load_profile("alds_fast")

SLOW_EXAMPLES = {"alds_fast.deployment.api.deploy"}


@pytest.fixture(autouse=True)
def no_call_is_known():
    """Tests change what calls of one kind go by."""
    calls._known.clear()


def pytest_collection_modifyitems(items):
    """Examples in docstrings cannot be marked where they stand."""
    for item in items:
        if item.name in SLOW_EXAMPLES:
            item.add_marker(pytest.mark.slow)


collect_ignore_glob = ["*conftest.py"]  # of one name, they cannot all be searched for doctests
