"""The machine code of the kernels: how its loops are found, and that those of some layers' launches stay as short."""

import copy
import json

import pytest
import triton

from benchmarks.common.results import RESULTS
from benchmarks.gpu import aot, sass, sass_table
from benchmarks.gpu.aot_table import of_triton

REMEDY = "if that is meant: python -m benchmarks.gpu.sass_table"


@pytest.fixture(scope="module")
def stored():
    file = RESULTS / f"{of_triton('sass')}.json"
    return json.loads(file.read_text()) if file.exists() else pytest.skip(f"there is no {file.name}")


def program(*lines):
    """Instructions of 16 bytes, from texts as nvdisasm has them."""
    found = [sass.LINE.search(f"/*{16 * i:04x}*/ {line} ;") for i, line in enumerate(lines)]
    return [sass.Instruction(int(f[1], 16), bool(f[2]), f[3], f[4].strip()) for f in found]


NESTED = program(
    "CALL.REL.NOINC 0xc0",  # a division
    "MOV R1, RZ",
    "LDG.E R2, [R4]",  # 20: the outer loop
    "LDGSTS.E.BYPASS.128 [R3], [R4]",  # 30: the inner one
    "HMMA.16816.F32 R8, R4, R2, R8",
    "@P0 BRA 0xa0",  # a cold piece, which comes back
    "BAR.SYNC.DEFER_BLOCKING 0x0",  # 60
    "@!P1 BRA 0x30",
    "@P2 BRA 0x20",
    "EXIT",
    "STS [R3], R8",  # a0
    "BRA 0x60",
    "RET.REL.NODEC R2 0x0",  # c0
    "BRA 0xd0",  # padding
)


def test_loops_are_found_with_their_cold_pieces():
    reached, loops = sass.loops(NESTED)
    assert reached == set(range(13))
    assert loops == [{2, 3, 4, 5, 6, 7, 8, 10, 11}, {3, 4, 5, 6, 7, 10, 11}]


def test_hot_loops_are_those_with_tensor_instructions():
    inner = {"instructions": 7, "tensor": 1, "barriers": 1, "async_copies": 1, "loads": 0}
    assert sass.counts(NESTED) == {"instructions": 13, "unrolled": False, "hot_loops": [inner]}


def test_without_tensor_instructions_loops_that_load_are_hot_and_without_loops_everything():
    plain = [i._replace(name="FFMA") if i.stem == "HMMA" else i for i in NESTED]
    assert [loop["instructions"] for loop in sass.counts(plain)["hot_loops"]] == [2, 7]
    assert sass.counts(program("LDG.E R2, [R4]", "EXIT")) == {
        "instructions": 2, "unrolled": True,
        "hot_loops": [{"instructions": 2, "tensor": 0, "barriers": 0, "async_copies": 0, "loads": 1}],
    }  # fmt: skip


def test_a_branch_to_an_unknown_address_is_refused():
    with pytest.raises(ValueError, match="BRX"):
        sass.loops(program("BRX R2 -0x10", "EXIT"))


@pytest.mark.parametrize(
    ("registers", "warps", "kib", "sm", "programs"),
    [
        (63, 8, 54, 90, 4),
        (147, 8, 48, 80, 1),
        (116, 8, 136, 90, 1),
        (39, 4, 24, 80, 6),
        (54, 4, 12, 80, 9),
        (24, 8, 0, 90, 8),
    ],
)
def test_programs_of_a_multiprocessor(registers, warps, kib, sm, programs):
    assert sass.programs_of_a_multiprocessor(registers, warps, kib * 1024, sm) == programs


def test_the_layers_stand_for_all_that_there_is(stored):
    rows = stored["rows"]
    assert {(row["kernel"], row["sm"]) for row in rows} == {
        (name, sm) for sm in (80, 90)
        for name in ("linear", "conv2d_taps", "conv2d_rows", "conv2d_walk", "encode_rows", "encode_vectors",
                     "decode_rows")
    }  # fmt: skip
    assert {row["PARTS"] for row in rows if "PARTS" in row} == {1, 2, 4, 8}
    assert {row["ACTIVATION"] for row in rows if "ACTIVATION" in row} == {"", "relu", "silu", "gelu"}
    assert {row["HAS_RESIDUAL"] for row in rows if "HAS_RESIDUAL" in row} == {True, False}


@pytest.mark.slow
def test_compiled_anew_no_launch_spills_or_has_longer_loops(stored):
    if triton.__version__ != stored["environment"]["triton"]:
        pytest.skip(f"the table was made by Triton {stored['environment']['triton']}, this is {triton.__version__}")
    found = sass_table.faults(aot.compiled_rows("benchmarks.gpu.launches"), stored["rows"])
    assert not found, "\n".join([*found, REMEDY])


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        ({"spilled_bytes": 8}, "spills 8 bytes"),
        ({"shared_bytes": 233_000}, "takes 233000 bytes of shared memory"),
        ({"registers": 255, "warps": 16}, "takes 130560 registers of 65536"),
        ({"stages": 7}, "is launched with stages=7, in the table with 4"),
        ({"unrolled": True}, "has hot loops of"),
        ({"layer": "another"}, "not in both"),
    ],
)
def test_what_is_wrong_is_named(stored, change, fault):
    rows = copy.deepcopy(stored["rows"])
    assert sass_table.faults(rows, stored["rows"]) == []
    next(row for row in rows if not row["unrolled"]).update(change)
    assert fault in "\n".join(sass_table.faults(rows, stored["rows"]))


def test_loops_may_grow_by_a_twentieth(stored):
    rows = copy.deepcopy(stored["rows"])
    loop = rows[0]["hot_loops"][0]
    before = loop["instructions"]
    loop["instructions"] = int(before * 1.05)
    assert sass_table.faults(rows, stored["rows"]) == []
    loop["instructions"] = int(before * 1.05) + 1
    (fault,) = sass_table.faults(rows, stored["rows"])
    assert f"has a hot loop of {loop['instructions']} instructions, in the table {before}" in fault
