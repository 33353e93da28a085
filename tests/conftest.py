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

from hypothesis import settings

settings.register_profile("alds_fast", deadline=None, derandomize=True, max_examples=60)
settings.load_profile("alds_fast")

collect_ignore_glob = ["*conftest.py"]  # of one name, they cannot all be searched for doctests
