"""What machine code of NVIDIA's GPUs says of a kernel without running it: its loops, and how many programs fit.

Only Triton's own nvdisasm is used, which reads the code of many kernels at once: it takes longer to start than to read.
"""

from __future__ import annotations

import itertools
import os
import re
import struct
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import NamedTuple

TARGET = {80: "SM80", 90: "SM90a"}
SHARED_LIMIT = {80: 163 * 1024, 90: 227 * 1024}  # bytes a block may use, CUDA C++ programming guide, table of features
SHARED_OF_ALL = {80: 164 * 1024, 90: 228 * 1024}  # bytes of a multiprocessor; every block takes 1024 more than it uses
REGISTERS, WARPS, BLOCKS = 65536, 64, 32  # of a multiprocessor
KINDS = {
    **dict.fromkeys(("HMMA", "IMMA", "HGMMA", "IGMMA"), "tensor"),
    **dict.fromkeys(("BAR", "SYNCS"), "barriers"),
    **dict.fromkeys(("LDGSTS", "UTMALDG"), "async_copies"),
    "LDG": "loads",
}
COUNTED = ("tensor", "barriers", "async_copies", "loads")
LINE = re.compile(r"/\*([0-9a-f]{4,})\*/ +(@!?\w+ +)?([\w.]+) *([^;]*);")


class Instruction(NamedTuple):
    """Where it stands in the kernel, whether a predicate may skip it, and the rest."""

    address: int
    predicated: bool
    name: str
    operands: str

    @property
    def stem(self) -> str:
        """The name without its modifiers."""
        return self.name.split(".")[0]


def code_of(cubin: bytes) -> bytes:
    """The machine code of a file with one kernel (64-bit ELF)."""
    (table,) = struct.unpack_from("<Q", cubin, 0x28)
    size, count, names = struct.unpack_from("<3H", cubin, 0x3A)
    headers = [struct.unpack_from("<IIQQQQ", cubin, table + i * size) for i in range(count)]
    start = headers[names][4]
    (code,) = (cubin[h[4] : h[4] + h[5]] for h in headers if cubin.startswith(b".text.", start + h[0]))
    return code


def disassembled(cubins: Sequence[bytes], sm: int) -> list[list[Instruction]]:
    """The instructions of every kernel; all of one architecture."""
    import triton

    codes = [code_of(cubin) for cubin in cubins]
    ends = list(itertools.accumulate(map(len, codes)))
    with tempfile.NamedTemporaryFile(suffix=".bin") as file:
        file.write(b"".join(codes))
        file.flush()
        tool = os.path.join(os.path.dirname(triton.__file__), "backends", "nvidia", "bin", "nvdisasm")
        done = subprocess.run([tool, "-b", TARGET[sm], file.name], capture_output=True, text=True, check=True)
    kernels: list[list[Instruction]] = [[] for _ in codes]
    which = 0
    for found in LINE.finditer(done.stdout):
        address = int(found[1], 16)
        while address >= ends[which]:
            which += 1
        kernels[which].append(Instruction(address, bool(found[2]), found[3], found[4].strip()))
    if any(16 * len(kernel) != len(code) for kernel, code in zip(kernels, codes, strict=True)):
        raise ValueError(f"nvdisasm gave {len(done.stdout)} characters in which not every instruction was found")
    return kernels


def _followers(code: Sequence[Instruction], i: int, place: dict[int, int]) -> list[int]:
    """Which instructions may come after the one at ``i``; a call is also followed by what comes after its return."""
    _, predicated, name, operands = code[i]
    stem = name.split(".")[0]
    if stem in ("BRX", "BRXU", "JMX", "JMXU"):
        raise ValueError(f"{name} {operands} branches to an address that is not in the code")
    target = re.search(r"0x[0-9a-f]+$", operands) if stem in ("BRA", "JMP", "CALL") else None
    ends = stem in ("EXIT", "RET", "KILL") or (target and stem != "CALL" and target[0] == operands)
    return ([place[int(target[0], 16)]] if target else []) + ([i + 1] if predicated or not ends else [])


def loops(code: Sequence[Instruction]) -> tuple[set[int], list[set[int]]]:
    """(every instruction that can be reached, per loop its instructions, inner loops included), as places in ``code``.

    A loop is what leads to a branch and begins at the branch's target, through which every way from outside goes.
    """
    place = {instruction.address: i for i, instruction in enumerate(code)}
    after: dict[int, list[int]] = {}
    waiting = [0]
    while waiting:
        i = waiting.pop()
        if i not in after:
            after[i] = _followers(code, i, place)
            waiting += after[i]
    before: dict[int, list[int]] = {i: [] for i in after}
    for i, others in after.items():
        for other in others:
            before[other].append(i)
    found: dict[int, set[int]] = {}
    for head, branches in before.items():
        for i in branches if len(branches) > 1 else ():
            body, waiting = {head}, [i]
            while waiting and 0 not in body:  # a way that comes from the kernel's first instruction
                inside = waiting.pop()
                if inside not in body:
                    body.add(inside)
                    waiting += before[inside]
            if 0 not in body:
                found.setdefault(head, set()).update(body)
    return set(after), [found[head] for head in sorted(found)]


def _counts(code: Iterable[Instruction]) -> dict[str, int]:
    instructions = list(code)
    kinds = Counter(KINDS.get(instruction.stem, "") for instruction in instructions)
    return {"instructions": len(instructions), **{kind: kinds[kind] for kind in COUNTED}}


def counts(code: Sequence[Instruction]) -> dict[str, object]:
    """Instructions of the kernel, and what is counted in its hot loops, each without the loops inside of it.

    A loop is hot if it has tensor instructions; where none has, if it reads memory. A kernel that is one long run of
    instructions is "unrolled", and counted like a loop.
    """
    reached, all_loops = loops(code)
    own = [loop.difference(*(other for other in all_loops if other < loop)) for loop in all_loops]
    counted = [_counts(code[i] for i in loop) for loop in own]
    hot = [c for c in counted if c["tensor"]] or [c for c in counted if c["loads"] + c["async_copies"]]
    hot_or_all = hot or [_counts(code[i] for i in reached)]
    return {"instructions": len(reached), "unrolled": not hot, "hot_loops": hot_or_all}


def programs_of_a_multiprocessor(registers: int, warps: int, shared_bytes: int, sm: int) -> int:
    """How many programs of a kernel run on a multiprocessor at once."""
    by_registers = 4 * (REGISTERS // 4 // (32 * -(-registers // 8) * 8)) // warps  # every quarter has its own
    by_shared = SHARED_OF_ALL[sm] // (-(-shared_bytes // 128) * 128 + 1024)
    return min(by_registers, by_shared, WARPS // warps, BLOCKS)
