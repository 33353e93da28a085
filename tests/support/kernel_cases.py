"""Tensors for the kernels in many shapes, and the operators that a call runs."""

import torch
from support.marks import slow
from torch.utils._python_dispatch import TorchDispatchMode

from alds_fast.kernels import dequantized, quantized_rows

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def random(*shape, dtype=torch.float32, seed=0, scale=1.0):
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return (scale * torch.randn(shape, generator=generator)).to(DEVICE, dtype)


def linear_case(m, c, groups, rank, f, dtype=torch.float32, bias=True, residual=True):
    c_group, q = c // groups, groups * rank
    return {
        "x": random(m, c, dtype=dtype, seed=1),
        "encoder": random(q, c_group, dtype=dtype, seed=2, scale=c_group**-0.5),
        "decoder": random(f, q, dtype=dtype, seed=3, scale=q**-0.5),
        "bias": random(f, dtype=dtype, seed=4) if bias else None,
        "residual": random(m, f, dtype=dtype, seed=5) if residual else None,
    }


def pivoted_case(m, c, rank, f, dtype=torch.float32, bias=True, residual=True):
    """Of f outputs the hidden values are rank, in a random order."""
    rest = linear_case(m, c, 1, rank, f - rank, dtype, bias=False, residual=False)
    order = torch.randperm(f, generator=torch.Generator().manual_seed(f + rank)).to(DEVICE)
    full = linear_case(m, c, 1, rank, f, dtype, bias, residual)
    return {**rest, "bias": full["bias"], "residual": full["residual"]}, order


def as_int8(case):
    """The case with int8 factors, its scales, and the same in float64 with dequantised factors."""
    pairs = {k: quantized_rows(t) for k, t in case.items() if k.startswith(("encoder", "decoder"))}
    exact = {k: None if t is None else t.double() for k, t in case.items()}
    exact |= {k: dequantized(values, scale.double()) for k, (values, scale) in pairs.items()}
    scales = [scale for _, scale in pairs.values()]
    return {**case, **{k: values for k, (values, _) in pairs.items()}}, scales, exact


PIVOTED = [  # rows, channels, rank, filters
    (1, 64, 16, 64), (2, 300, 33, 70), (5, 96, 24, 96), (16, 40, 30, 31), (17, 64, 16, 64), (65, 70, 33, 129),
    (40, 48, 130, 200), (20, 24, 1, 2),
]  # fmt: skip
LINEAR = [  # rows, channels, groups, rank, filters
    (1, 64, 1, 16, 64), (1, 1, 1, 1, 1), (16, 200, 1, 100, 33), (7, 24, 8, 3, 5), (3, 300, 2, 70, 40),
    (2, 1024, 1, 16, 16), (5, 96, 4, 24, 96), (17, 64, 1, 16, 64), (40, 30, 3, 5, 33), (65, 70, 1, 33, 129),
    (33, 64, 8, 8, 16), (20, 48, 1, 130, 70), (18, 64, 2, 128, 48), (17, 40, 1, 250, 20), (19, 128, 4, 64, 33),
    (130, 16, 1, 1, 17), (2, 2100, 1, 1100, 20), (12, 1024, 2, 16, 48), (1, 20000, 1, 4, 8),
]  # fmt: skip


def conv_case(n, c, size, groups, rank, f, kernels, dtype=torch.float32, bias=True):
    (e, d), q, c_group = kernels, groups * rank, c // groups
    return {
        "x": random(n, c, *size, dtype=dtype, seed=1),
        "encoder": random(q, c_group, *e, dtype=dtype, seed=2, scale=(c_group * e[0] * e[1]) ** -0.5),
        "decoder": random(f, q, *d, dtype=dtype, seed=3, scale=(q * d[0] * d[1]) ** -0.5),
        "bias": random(f, dtype=dtype, seed=4) if bias else None,
    }


def by_one(*kernel):
    return (kernel, (1, 1))


CONV = [  # (n, c, size, groups, rank, f, kernels), options
    ((2, 8, (7, 9), 2, 3, 20, by_one(3, 3)), {"padding": 1}),
    ((1, 32, (8, 8), 1, 20, 33, by_one(3, 3)), {"stride": 2, "padding": 1}),
    ((3, 16, (6, 5), 8, 2, 17, by_one(3, 3)), {"padding": (2, 1), "dilation": (2, 1)}),
    ((1, 3, (11, 12), 1, 5, 16, by_one(7, 7)), {"stride": (2, 3), "padding": 3}),
    ((1, 12, (5, 5), 4, 2, 300, by_one(1, 1)), {}),
    ((2, 12, (5, 6), 1, 1, 9, by_one(1, 1)), {"stride": 2}),
    ((1, 20, (4, 4), 1, 9, 70, by_one(2, 3)), {}),
    ((1, 130, (3, 3), 1, 130, 18, by_one(3, 3)), {"padding": 1}),
    ((4, 4, (1, 1), 2, 1, 8, by_one(1, 1)), {"padding": 1}),
    ((1, 8, (30, 1), 2, 4, 8, by_one(5, 1)), {"padding": (2, 0), "stride": (3, 1)}),
    ((1, 16, (40, 2), 1, 4, 8, by_one(36, 1)), {"padding": (3, 0)}),
    ((9, 64, (1, 1), 2, 32, 64, by_one(3, 3)), {"padding": 1, "dilation": 1}),
    ((2, 32, (9, 7), 2, 16, 48, by_one(3, 3)), {"padding": 1}),
    ((1, 48, (10, 12), 1, 32, 272, by_one(3, 3)), {"padding": 2, "dilation": 2}),
    ((1, 16, (5, 6), 1, 16, 16, by_one(5, 3)), {"padding": (2, 1)}),
    ((2, 16, (7, 9), 1, 16, 32, by_one(5, 5)), {"padding": 2}),
    ((1, 32, (6, 11), 2, 16, 48, by_one(3, 5)), {"padding": (1, 2)}),
    ((2, 16, (9, 12), 1, 16, 16, by_one(1, 5)), {"padding": (0, 4), "dilation": (1, 2)}),
    ((3, 16, (4, 3), 1, 16, 16, by_one(5, 5)), {"padding": 2}),
]

WALK = [  # n, c, size, rank, f of a 1 x 1 encoder and a 3 x 3 decoder
    (2, 16, (5, 6), 16, 32), (1, 64, (3, 64), 32, 64), (3, 48, (9, 7), 32, 48), (9, 16, (2, 8), 16, 16),
    (2, 32, (1, 1), 16, 16), (5, 16, (7, 3), 32, 64), (1, 32, (19, 33), 16, 48), (70, 16, (1, 2), 16, 16),
]  # fmt: skip


def walk_case(n, c, size, rank, f, dtype, bias=True):
    """Of scheme 3: stride 1, one slice."""
    return conv_case(n, c, size, 1, rank, f, ((1, 1), (3, 3)), dtype, bias)


# For tests of one case at a time. Those are slow that take the interpreter long: many channels, many tiles.
EACH_LINEAR = [slow(case) if i in (2, 4, 9, 16, 17, 18) else case for i, case in enumerate(LINEAR)]
EACH_CONV = [slow(*case) if i in (0, 2, 3, 4, 7, 10, 12, 13) else case for i, case in enumerate(CONV)]


class Recorder(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen = [*getattr(self, "seen", []), str(func)]
        return func(*args, **(kwargs or {}))


def ran(call):
    with torch.no_grad(), Recorder() as recorder:
        call()
    return recorder.seen
