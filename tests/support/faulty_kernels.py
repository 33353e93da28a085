"""Kernels that are wrong in one way each, and their launches: the checks must find every one of them."""

import torch
import triton
import triton.language as tl


@triton.jit
def _reads_past(x, z, y, n, B: tl.constexpr):
    i = tl.program_id(0) * B + tl.arange(0, B)
    tl.store(y + i, tl.load(x + i) + tl.load(z + i, mask=i < n, other=0.0), mask=i < n)


@triton.jit
def _writes_past(x, y, n, B: tl.constexpr):
    i = tl.program_id(0) * B + tl.arange(0, B)
    tl.store(y + i, tl.load(x + i, mask=i < n, other=0.0))


@triton.jit
def _races(x, y, n, B: tl.constexpr):
    i = tl.program_id(0) * (B - 4) + tl.arange(0, B)  # tiles overlap, and what they store differs
    tl.store(y + i, tl.load(x + i, mask=i < n, other=0.0) + tl.program_id(0), mask=i < n)


@triton.jit
def _adds_to_what_was_there(x, y, n, B: tl.constexpr):
    i = tl.program_id(0) * B + tl.arange(0, B)
    tl.store(y + i, tl.load(y + i, mask=i < n, other=0.0) + tl.load(x + i, mask=i < n, other=0.0), mask=i < n)


@triton.jit
def _adds_parts(x, parts, tickets, y, n, B: tl.constexpr, PARTS: tl.constexpr, LATE: tl.constexpr,
                SEM: tl.constexpr):  # fmt: skip
    """y = the sum of PARTS rows of x; LATE stores a part after the ticket is drawn."""
    i = tl.arange(0, B)
    keep = i < n
    part = parts + tl.program_id(0) * n + i
    value = tl.load(x + tl.program_id(0) * n + i, mask=keep, other=0.0)
    if not LATE:
        tl.store(part, value, mask=keep)
        tl.debug_barrier()
    drawn = tl.atomic_add(tickets, 1, sem=SEM)
    if LATE:
        tl.store(part, value, mask=keep)
    if drawn == PARTS - 1:
        total = tl.zeros((B,), dtype=tl.float32)
        for s in tl.static_range(PARTS):
            total += tl.load(parts + s * n + i, mask=keep, other=0.0)
        tl.store(y + i, total, mask=keep)
        tl.store(tickets, 0)


def _neighbours(count):
    """Tensors one right after the other in memory."""
    arena = torch.arange(100.0 * count).numpy()
    return [torch.from_numpy(arena[100 * i : 100 * (i + 1)]) for i in range(count)]


def reads_past():
    x, z, y = _neighbours(3)
    _reads_past[7,](x, z, y, 100, B=16)


def writes_past():
    x, y = _neighbours(2)
    _writes_past[7,](x, y, 100, B=16)


def races():
    x, y = _neighbours(2)
    _races[9,](x, y, 100, B=16)


def adds_to_what_was_there():
    y = torch.empty(100)
    _adds_to_what_was_there[7,](torch.ones(100), y, 100, B=16)
    if not torch.isfinite(y).all():
        raise AssertionError("the result holds what was never written")


def adds_parts(late=False, sem="acq_rel"):
    x, y = torch.ones(4, 10), torch.empty(10)
    tickets = torch.zeros(1, dtype=torch.int32)
    _adds_parts[4,](x, torch.empty(4, 10), tickets, y, 10, B=16, PARTS=4, LATE=late, SEM=sem)
    if not (torch.equal(y, torch.full((10,), 4.0)) and tickets.item() == 0):
        raise AssertionError(f"{y}, tickets {tickets}")


CONTROLS = {  # what is wrong -> (launch, what must be said of it)
    "reads past the end of a tensor, into the next one": (reads_past, "past the end of the tensor passed as `x`"),
    "writes past the end of a tensor": (writes_past, "past the end of the tensor passed as `y`"),
    "two programs store to one element": (races, "both touch element"),
    "adds to memory that nobody wrote": (adds_to_what_was_there, "never written"),
    "stores a part after the ticket is drawn": (lambda: adds_parts(late=True), "both touch element"),
    "draws from a ticket without acquire and release": (lambda: adds_parts(sem="relaxed"), "both touch element"),
}
