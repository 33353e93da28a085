"""The GPU suite's command itself, at tiny sizes on the CPU: what it writes. No test looks at a time."""

import json
import os
import subprocess
import sys

import pytest

pytestmark = pytest.mark.slow

COMMAND = [sys.executable, "-m", "benchmarks.gpu.suite", "--quick", "--device", "cpu"]
TOP = {"device", "torch", "triton", "commit", "rows", "ceilings", "correctness", "end_to_end", "not_run"}
FIELDS = {"op", "shape", "dtype", "dense_ms", "two_op_ms", "fused_ms", "deployed_ms", "roofline_ms", "max_error"}
FIELDS |= {"quantiles", "compiled_ms", "reasons", "errors", "error"}


def run(folder, *options, **environment):
    """Exit code and results of the command."""
    env = {**os.environ, "OMP_WAIT_POLICY": "PASSIVE", **environment}
    done = subprocess.run([*COMMAND, "--out", folder, *options], env=env, capture_output=True, text=True, timeout=150)
    files = {p.name: p for p in folder.iterdir()}
    assert {"gpu_cpu_quick.json", "gpu_cpu_quick.md", "gpu_cpu_quick.png"} <= files.keys(), done.stdout + done.stderr
    return done, json.loads(files["gpu_cpu_quick.json"].read_text()), files["gpu_cpu_quick.md"].read_text()


@pytest.fixture(scope="module")
def everything(tmp_path_factory):
    """A quick run of all steps, without the interpreter."""
    return run(tmp_path_factory.mktemp("suite"), TRITON_INTERPRET="0")


def test_every_step_ran(everything):
    done, results, _ = everything
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert results.keys() >= TOP and results["not_run"] == [] and results["deaths"] == []
    assert results["correctness"]["ok"] and results["correctness"]["passed"] > 5
    assert results["ceilings"]["copy_bytes_per_s"] > 0 and results["ceilings"]["bf16_flops_per_s"] > 0


def test_rows_are_complete(everything):
    _, results, _ = everything
    assert {row["op"] for row in results["rows"]} == {"conv3x3", "conv1x1", "linear", "qkv"}
    for row in results["rows"]:
        assert row.keys() >= FIELDS and row["error"] is None and row["errors_ok"] is True
        assert row["dense_ms"] > 0 and row["two_op_ms"] > 0 and row["roofline_ms"] > 0
        assert row["deployed_ms"] == min(row["dense_ms"], row["two_op_ms"])
        assert row["fused_ms"] is None and "it runs on CUDA devices" in row["reasons"]["fused"]
        assert row["max_error"] < (1e-2 if row["dtype"] == "bfloat16" else 1e-5)
    assert sum(row["compiled_ms"] is not None for row in results["rows"]) == 1


def test_whole_models(everything):
    _, results, text = everything
    assert len(results["end_to_end"]) == 2
    for model in results["end_to_end"].values():
        assert model["sides"].keys() >= {"dense", "two_op", "deployed", "dense_compiled", "deployed_compiled"}
        assert model["reasons"].keys() == {"fused"} and "no layer can run fused" in model["reasons"]["fused"]
        assert model["errors"]["two_op"] < 1e-5 and model["errors"]["deployed"] < 1e-4
        assert model["deploy"]["model_ms"].keys() == {"dense", "two-op", "deployed"}
        assert model["deploy"]["table"] in text


def test_fused_rows_under_the_interpreter(tmp_path):
    steps = ("--steps", "ceilings,rows", "--match", "linear|3x3.*q8")
    done, results, text = run(tmp_path, *steps, TRITON_INTERPRET="1")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    fused = [row for row in results["rows"] if row["fused_ms"] is not None]
    assert fused and all(row["interpreted"] and row["errors_ok"] for row in fused) and "(interpreted)" in text
    assert {n["name"] for n in results["not_run"]} == {"step correctness", "step end_to_end", "step compiled"}


def test_what_does_not_fit_is_listed(tmp_path):
    done, results, text = run(tmp_path, "--steps", "rows,compiled", "--minutes", "0.001")
    assert done.returncode == 0 and results["rows"] == []
    names = [n["name"] for n in results["not_run"]]
    assert sum(n.startswith("row ") for n in names) == 7 and any(n.startswith("compiled ") for n in names)
    assert all(name in text for name in names)
