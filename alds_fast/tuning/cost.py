"""How long a launch takes with a tiling, by a first-order model; what cannot run or spills is left out before.

Every resource's time (instructions, tensor units, shared memory, L2, memory), combined by a p-norm: programs of one
multiprocessor overlap the more, the more of them there are. Launches of few rows wait for their weights: as many bytes
are on their way at once as their buffers hold. The model ranks tilings so that fewer need to be measured; it is no
measurement.
"""

from __future__ import annotations

from math import ceil

from ..kernels import DecodeKey, EncodeKey, LaunchKey, Tiling
from .rates import Rates
from .work import LaunchWork, Loop, work_of

REGISTERS = 65536  # of a multiprocessor
MOST_REGISTERS = 255  # registers of a thread
BASE = 56  # registers of a thread for addresses, masks and counters
LATENCY = 0.7e-6  # seconds until a value from memory arrives
OVERHEAD = 55  # instructions a turn of a loop takes per warp, whatever its tiles are


def registers_of(work: LaunchWork, t: Tiling) -> int:
    """About what a thread takes: what it holds in float32, and addresses."""
    return BASE + work.held // (32 * t.num_warps)


def resident(work: LaunchWork, t: Tiling, rates: Rates) -> int:
    """Programs that a multiprocessor runs at once; 0 for what spills or does not fit."""
    early = rates.capability < (9, 0)
    registers = registers_of(work, t) + early * work.kept * work.size // 128  # four bytes of each of 32 threads
    shared = work.shared_bytes(t.num_stages - early)
    if registers > MOST_REGISTERS or shared > rates.shared_limit:
        return 0
    by_registers = REGISTERS // (registers * 32 * t.num_warps)
    return min(by_registers, (rates.shared_limit + 1024) // (shared + 1024), 64 // t.num_warps, 32)


def _instructions(loop: Loop, size: int, t: Tiling) -> float:
    """Of a turn, per warp: what every turn takes, copies of 16 bytes with their addresses, and products."""
    copies = loop.values * size / 16 / (32 * t.num_warps)
    return OVERHEAD + 8 * copies + loop.products / (4096 * t.num_warps)


def seconds_of(key: LaunchKey, t: Tiling, rates: Rates) -> float | None:
    """The time of the launch by the model; None where the tiling spills or does not fit."""
    work = work_of(key, t)
    at_once = resident(work, t, rates)
    if at_once == 0:
        return None
    memory = work.memory_bytes / rates.memory
    if isinstance(key, EncodeKey | DecodeKey):
        (loop,) = work.loops
        running = min(work.programs, at_once * rates.multiprocessors)
        buffers = loop.times if key.vectors else t.num_stages - 1
        under_way = running * buffers * loop.cols * loop.reduction * work.size
        return max(memory, work.memory_bytes / under_way * LATENCY) + LATENCY + rates.launch
    each = work.programs / rates.multiprocessors
    tail = ceil(each) / each if each < 12 else 1.02
    busy = each * tail / rates.clock
    issued = (work.fixed + sum(loop.times * _instructions(loop, work.size, t) for loop in work.loops)) * t.num_warps / 4
    speed = rates.products if work.size == 2 else rates.products / 16  # float32 products are not of the tensor units
    products = sum(loop.times * loop.products for loop in work.loops) / speed / 0.85
    shared = sum(2 * loop.times * loop.values * work.size for loop in work.loops) / 128
    parts = issued * busy, products * busy, shared * busy, work.l2_bytes / rates.l2, memory
    power = {1: 1.5, 2: 2.5}.get(at_once, 4.0)
    return float(sum(part**power for part in parts) ** (1 / power)) + rates.launch
