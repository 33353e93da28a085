"""Make Triton's interpreter right for bfloat16, and watch what it loads.

It keeps bfloat16 as raw uint16: products multiply the bit patterns, casts from float32 truncate, and integers are taken
for such patterns. All is mended here, for tests only, with torch's own conversion (round to nearest, ties to even).
"""

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter


def _widen(handle):
    if handle.dtype.scalar != tl.bfloat16:
        return handle
    bits = torch.from_numpy(np.ascontiguousarray(handle.data).view(np.int16))
    return interpreter.TensorHandle(bits.view(torch.bfloat16).float().numpy(), tl.float32)


def _narrow(data):
    rounded = torch.from_numpy(np.ascontiguousarray(data, dtype=np.float32)).bfloat16()
    return interpreter.TensorHandle(rounded.view(torch.int16).numpy().view(np.uint16), tl.bfloat16)


def mend():
    """Patch the interpreter, once per process."""
    from alds_fast.kernels import backend as chooser

    builder = interpreter.InterpreterBuilder
    cast, dot = builder.cast_impl, builder.create_dot

    def cast_impl(self, src, dst_type):
        source, target = src.dtype.scalar, dst_type.scalar
        if source == tl.float32 and target == tl.bfloat16:
            return _narrow(src.data)
        return _widen(src) if source == tl.bfloat16 and target == tl.float32 else cast(self, src, dst_type)

    def create_dot(self, a, b, d, *options):
        return dot(self, _widen(a), _widen(b), d, *options)

    builder.cast_impl, builder.create_dot = cast_impl, create_dot
    for name in ("create_fp_ext", "create_fp_trunc"):
        setattr(builder, name, lambda self, src, dst_type: self.cast_impl(src, dst_type))
    si_to_fp, fp_to_fp = builder.create_si_to_fp, builder.create_fp_to_fp

    def create_si_to_fp(self, src, dst_type):
        return _narrow(src.data) if dst_type.scalar == tl.bfloat16 else si_to_fp(self, src, dst_type)

    def create_fp_to_fp(self, src, dst_type, rounding):
        if tl.bfloat16 in (src.dtype.scalar, dst_type.scalar) and tl.float32 in (src.dtype.scalar, dst_type.scalar):
            return self.cast_impl(src, dst_type)
        return fp_to_fp(self, src, dst_type, rounding)

    builder.create_si_to_fp, builder.create_fp_to_fp = create_si_to_fp, create_fp_to_fp
    chooser.INTERPRETER_TYPES.append(torch.bfloat16)


def watched_loads(monkeypatch, tensors):
    """A list to which every later load adds whether all it reads without a mask lies inside one of the tensors."""
    ranges = [(t.data_ptr(), t.data_ptr() + t.numel() * t.element_size()) for t in tensors]
    load, seen = interpreter._interpreter.load, []

    def checked(ptrs, mask, *rest):
        wanted = ptrs[mask].astype("int64")
        inside = sum(((wanted >= begin) & (wanted < end)).astype(int) for begin, end in ranges)
        seen.append(bool((inside == 1).all()))
        return load(ptrs, mask, *rest)

    monkeypatch.setattr(interpreter._interpreter, "load", checked)
    return seen
