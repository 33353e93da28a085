"""Tilings on disk, and kernels compiled ahead in other processes."""

import contextlib
import json
import multiprocessing
import os
import re
import signal
import sys
import threading
import time
import warnings

import pytest
import torch

from alds_fast.files import locked, write_text
from alds_fast.kernels import ConvKey, DecodeKey, EncodeKey, LinearKey, Measured, Tiling, keep_tilings, measured
from alds_fast.kernels.tilings import files, tables
from alds_fast.layers import LowRankConv2d, LowRankLinear
from alds_fast.measurement import InputSpec
from alds_fast.tuning.compilation import Compilation, compile_ahead, without_data
from alds_fast.tuning.rates import H100

GPU = torch.device("cuda", 0)
HALF = torch.bfloat16
LINEAR = LinearKey(HALF, 512, 256, 512, 64, 1, False, True, False, None, True, "ieee")
CONV = ConvKey(HALF, 128, 64, 64, 16, 1, (8, 8), (3, 3), (1, 1), (1, 1), (1, 1), True, False, "relu", True, "ieee")
DECODE = DecodeKey(torch.float16, 16, (8, 8), (16, 32), False, False, False, None, True, "ieee")
FOUND = {
    LINEAR: Measured(Tiling(64, 64, 64, 4, 3), 10.5, 12.0, 1e-3),
    CONV: Measured(Tiling(128, 64, 64, 8, 2, by_rows=True), 3.5, 4.0, 2e-3),
    DECODE: Measured(None, 5.0, 5.0, 0.0),
    DECODE._replace(rows=1): Measured(Tiling(1, 64, 4, 4, 1), 5.0, None, 0.0),
}
ABOUT = {"device": "NVIDIA H100 80GB HBM3", "capability": "9.0", "triton": "3.9.0", "source": "0123456789ab"}


@pytest.fixture(autouse=True)
def a_gpu(monkeypatch, tmp_path):
    monkeypatch.setattr(tables, "_tables", {})
    monkeypatch.setattr(tables, "_measured", {})
    monkeypatch.setenv("ALDS_FAST_CACHE", str(tmp_path))
    for module in (files, tables):
        if hasattr(module, "environment_of"):
            monkeypatch.setattr(module, "environment_of", lambda device: dict(ABOUT))


def forget():
    tables._tables.clear()
    tables._measured.clear()


def test_what_is_kept_is_taken_by_later_processes(tmp_path):
    keep_tilings(GPU, FOUND)
    (file,) = (tmp_path / "tilings").glob("*.json")
    assert file.name == "NVIDIA_H100_80GB_HBM3-9.0-3.9.0-0123456789ab.json"
    forget()
    assert measured(GPU) == FOUND
    assert tables.tuned(GPU, LINEAR) == FOUND[LINEAR].tiling and tables.tuned(GPU, CONV).by_rows
    assert tables.tuned(GPU, DECODE) is None and tables.tuned(GPU, LINEAR._replace(rows=1024)) is None


def test_processes_add_to_one_file():
    keep_tilings(GPU, {LINEAR: FOUND[LINEAR]})
    forget()
    measured(GPU)
    tables._measured[GPU] = {}  # a process that began before the first one wrote
    keep_tilings(GPU, {CONV: FOUND[CONV]})
    forget()
    assert set(measured(GPU)) == {LINEAR, CONV}


def test_processes_that_write_at_once_both_add(monkeypatch):
    def slowly(file, text):
        time.sleep(0.2)
        write_text(file, text)

    def add(key, others):
        others.wait(10)
        keep_tilings(GPU, {key: FOUND[key]})

    monkeypatch.setattr(files, "write_text", slowly)
    context = multiprocessing.get_context("fork")
    both = context.Barrier(2)
    processes = [context.Process(target=add, args=(key, both)) for key in (LINEAR, CONV)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(30)
        assert process.exitcode == 0
    assert measured(GPU) == {key: FOUND[key] for key in (LINEAR, CONV)}


def test_a_lock_that_is_not_given_back_is_not_waited_for(monkeypatch):
    monkeypatch.setattr(files, "WAIT_FOR_OTHERS", 0.1)
    keep_tilings(GPU, {LINEAR: FOUND[LINEAR]})
    with locked(files.file_of(GPU).with_suffix(".lock")) as alone:
        assert alone
        start = time.monotonic()
        keep_tilings(GPU, {CONV: FOUND[CONV]})
        assert 0.1 <= time.monotonic() - start < 5
        with locked(files.file_of(GPU).with_suffix(".lock")) as again:
            assert not again
    forget()
    assert set(measured(GPU)) == {LINEAR, CONV}


def changed(where, value):
    def change(data):
        for name in where[:-1]:
            data = data[name]
        data[where[-1]] = value

    return change


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (changed(["environment", "source"], "other"), "it is of another environment"),
        (changed(["version"], 99), "it is of another environment"),
        (changed(["tilings", 0, "tiling", "rows"], 48), "powers of two from 1 to 1024"),
        (changed(["tilings", 0, "tiling", "rows"], "64"), "powers of two"),
        (changed(["tilings", 0, "tiling", "num_stages"], 20), "stages are from 1 to 8"),
        (changed(["tilings", 0, "us"], -1.0), "are not microseconds"),
        (changed(["tilings", 0, "kernel"], "other"), "other"),
        (changed(["tilings", 0, "key", "unknown"], 1), "unknown"),
        (changed(["tilings"], None), "NoneType"),
    ],
)
def test_what_is_no_such_file_holds_nothing(change, reason):
    keep_tilings(GPU, FOUND)
    file = files.file_of(GPU)
    data = json.loads(file.read_text())
    change(data)
    file.write_text(json.dumps(data))
    forget()
    with pytest.warns(UserWarning, match="first guesses are taken") as told:
        assert measured(GPU) == {}
    assert reason in str(told[0].message)
    file.write_text("{")
    forget()
    with pytest.warns(UserWarning, match="is not a valid file of tilings"):
        assert tables.tuned(GPU, LINEAR) is None
    keep_tilings(GPU, {LINEAR: FOUND[LINEAR]})
    forget()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert set(measured(GPU)) == {LINEAR}


def test_a_folder_that_cannot_be_written_is_told(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("ALDS_FAST_CACHE", str(tmp_path / "file"))
    with pytest.warns(UserWarning, match="tilings could not be kept .* ALDS_FAST_CACHE names another folder"):
        keep_tilings(GPU, FOUND)
    assert tables.tuned(GPU, LINEAR) == FOUND[LINEAR].tiling  # this process takes them all the same


def test_without_a_home_first_guesses_are_taken(monkeypatch):
    def homeless(device):
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(files, "file_of", homeless)
    with pytest.warns(UserWarning, match="Could not determine home directory.*first guesses"):
        assert tables.tuned(GPU, LINEAR) is None
    assert tables.tuned(GPU, LINEAR) is None  # and is not asked again
    with pytest.warns(UserWarning, match="tilings could not be kept in ~"):
        keep_tilings(GPU, FOUND)


def compilations():
    linear = LowRankLinear(256, 512, 64).to(HALF)
    conv = LowRankConv2d(64, 64, 3, 16, padding=1).to(HALF)
    specs = InputSpec.of(torch.zeros(500, 256, dtype=HALF)), InputSpec((2, 64, 8, 8), HALF, "cpu", channels_last=True)
    tilings = (Tiling(64, 64, 64, 4, 3), Tiling(128, 128, 128, 8, 5)), (Tiling(64, 64, 64, 4, 2, by_rows=True),)
    keys = LINEAR, CONV._replace(activation=None)
    for module, spec, key, some in zip((linear, conv), specs, keys, tilings, strict=True):
        module.backend = "fused"
        yield from (Compilation(without_data(module), spec, key, t) for t in some)


@pytest.mark.slow
def test_kernels_are_compiled_ahead(tmp_path, monkeypatch, caplog):
    pytest.importorskip("triton")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "triton"))
    work, steps = list(compilations()), []

    def compiled():
        steps.clear()
        small = H100._replace(shared_limit=100_000)
        with caplog.at_level("INFO"):
            faults = compile_ahead(work, small, lambda *of: steps.append(of), processes=1)
        assert steps == [("kernels compiled", i, 3) for i in (1, 2, 3)] and not caplog.records
        assert list(faults) == [(LINEAR, work[1].tiling)]
        assert "bytes of shared memory, 100000 are there" in faults[LINEAR, work[1].tiling]
        return sorted(str(path) for path in (tmp_path / "triton").rglob("*") if path.suffix == ".cubin")

    first = compiled()
    assert len(first) == 3 and any("conv2d_rows" in name for name in first)
    assert compiled() == first  # found in Triton's cache
    assert os.environ.get("TRITON_INTERPRET") == "1"  # here nothing has changed


@pytest.mark.slow
def test_tilings_that_spill_are_left_out(tmp_path, monkeypatch):
    """Only the launch that takes the tiling counts, not the first guess beside it that is too large as well."""
    pytest.importorskip("triton")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "triton"))
    (linear, *_) = compilations()
    spills = linear._replace(tiling=Tiling(128, 64, 256, 4, 2))
    few = linear._replace(spec=InputSpec.of(torch.zeros(16, 256, dtype=HALF)))
    encode = EncodeKey(HALF, 16, 256, 64, 1, False, "ieee")
    decode = DecodeKey(HALF, 16, (64,), (512,), False, False, False, None, True, "ieee")
    encodes = [few._replace(key=encode, tiling=Tiling(16, k, 16, 2, 4, 1)) for k in (32, 128)]
    decodes = [few._replace(key=decode, tiling=Tiling(16, 32, 16, 2, 2))]
    work = [spills, *encodes, *decodes]
    faults = compile_ahead(work, H100._replace(shared_limit=16_000), lambda *of: None, processes=1)
    assert list(faults) == [(LINEAR, spills.tiling), (encode, encodes[1].tiling)]
    assert "bytes of shared memory" in faults[encode, encodes[1].tiling]
    faults = compile_ahead(work, H100, lambda *of: None, processes=1)
    assert list(faults) == [(LINEAR, spills.tiling)]
    assert re.fullmatch("spills [1-9][0-9]* bytes a thread", faults[LINEAR, spills.tiling])


@pytest.mark.slow
def test_what_does_not_compile_is_told(tmp_path, monkeypatch, caplog):
    pytest.importorskip("triton")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "triton"))
    (work, *_) = compilations()
    with caplog.at_level("INFO"):
        assert compile_ahead([work._replace(tiling=Tiling(48, 64, 64, 4, 3))], H100, lambda *of: None, 1) == {}
    assert "is not compiled ahead" in caplog.text
    assert compile_ahead([], H100, lambda *of: None) == {}


COMPILER = """#!/bin/sh
exec 2> {fifo}
: > $TMPDIR/left
sleep 30 &
echo $TMPDIR >&2
wait
"""


def test_an_interrupt_ends_the_compilers(tmp_path, monkeypatch):
    """Two processes whose compilers, processes too, go on: while one of them lives the pipe has an end to write to."""
    fifo, script = tmp_path / "fifo", tmp_path / "compiler"
    script.write_text(COMPILER.format(fifo=fifo))
    script.chmod(0o700)
    os.mkfifo(fifo)
    pipe, lines = os.open(fifo, os.O_RDONLY | os.O_NONBLOCK), []

    def interrupt():
        while len(lines) < 2:
            time.sleep(0.05)
            with contextlib.suppress(BlockingIOError):
                lines.extend(os.read(pipe, 4096).decode().splitlines())
        os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(sys, "executable", str(script))
    thread, start = threading.Thread(target=interrupt), time.monotonic()
    thread.start()
    with pytest.raises(KeyboardInterrupt):
        compile_ahead(list(compilations()) * 3, H100, lambda *of: lines.append(of), processes=2)
    thread.join()
    while True:
        try:
            lines += os.read(pipe, 4096).splitlines()
            break  # nobody is there to write
        except BlockingIOError:
            assert time.monotonic() - start < 20
            time.sleep(0.05)
    os.close(pipe)
    assert (
        time.monotonic() - start < 20 and len(lines) == 2 and len(set(lines)) == 1
    )  # nothing else was started or told
    assert not os.path.exists(lines[0])


def test_modules_that_cannot_be_pickled_compile_where_they_run():
    layer = LowRankLinear(16, 16, 4)
    assert without_data(layer) is not None and layer.encoder.device.type == "cpu"
    layer.extra = lambda: None
    assert without_data(layer) is None
