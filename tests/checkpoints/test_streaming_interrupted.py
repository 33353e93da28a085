"""Jobs over checkpoint directories that are killed, fail or find other files: they go on to the same result."""

import os
import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from support import checkpoints
from support.checkpoints import OPTIONS, first_shard, poison
from support.marks import slow

import alds_fast as alds
from alds_fast import errors
from alds_fast.checkpoints.streaming import factors_and_files
from alds_fast.checkpoints.streaming.journal import FOLDER

KILLED = Path(__file__).parents[1] / "support" / "killed.py"


@pytest.mark.slow
def test_killed_at_any_moment(tmp_path, llama):
    command = [sys.executable, KILLED, llama / "dense", tmp_path / "small"]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert int(run.stdout.split()[0]) >= 20 and run.stdout.count(":") == 4
    assert checkpoints.contents(tmp_path / "small") == checkpoints.contents(llama / "small")


def torchrun(processes, *arguments):
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(processes), "--master-port", "0"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command += ["--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0", "-m", "alds_fast", "compress"]
    return subprocess.run([*command, *map(str, arguments)], capture_output=True, text=True, env=environment)


@pytest.mark.slow
def test_three_processes(tmp_path, llama):
    run = torchrun(3, llama / "dense", "-o", tmp_path / "small", "--params", 0.7, "--max-shard-gb", 0.00006)
    assert run.returncode == 0, run.stderr
    assert run.stdout.count("wrote ") == 1
    assert checkpoints.contents(tmp_path / "small") == checkpoints.contents(llama / "small")


@pytest.mark.slow
def test_a_process_that_fails_ends_all(tmp_path, copied, llama):
    name, good = poison(copied, b"\x00\x00\xc0\x7f")
    arguments = (copied, "-o", tmp_path / "small", "--params", 0.7, "--max-shard-gb", 0.00006)
    run = torchrun(2, *arguments)
    assert run.returncode != 0 and f"layer '{name}': 1 of" in run.stderr and not list(tmp_path.glob("small/*.json"))
    poison(copied, good)
    run = torchrun(2, *arguments)
    assert run.returncode == 0, run.stderr
    assert checkpoints.contents(tmp_path / "small") == checkpoints.contents(llama / "small")


def test_nan_names_the_layer_and_loses_nothing(tmp_path, copied, llama):
    name, good = poison(copied, b"\x00\x00\xc0\x7f")
    with pytest.raises(errors.WeightError, match=f"layer '{name}': 1 of 11264 weights"):
        alds.compress_checkpoint(copied, tmp_path / "small", **OPTIONS)
    poison(copied, good)
    alds.compress_checkpoint(copied, tmp_path / "small", **OPTIONS)
    assert checkpoints.contents(tmp_path / "small") == checkpoints.contents(llama / "small")


def test_changed_between_analysis_and_factors(tmp_path, copied, monkeypatch):
    def change(work):
        poison(copied, b"\x00\x00\x80\x3f")
        return plan(work)

    plan = factors_and_files.find_plan
    monkeypatch.setattr(factors_and_files, "find_plan", change)
    with pytest.raises(errors.FileFormatError, match=r"layers\.1\.mlp\.up_proj.*changed since it was analysed"):
        alds.compress_checkpoint(copied, tmp_path / "small", **OPTIONS)


def test_full_disk_loses_nothing(tmp_path, llama):
    child = os.fork()
    if child == 0:  # files of more than 30 kB cannot be written here: spectra and small factors can
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, 30_000))
        torch.set_num_threads(1)
        try:
            alds.compress_checkpoint(llama / "dense", tmp_path / "small", **OPTIONS)
        except errors.FileWriteError as e:
            os._exit(3 if "free some space and run the same command again" in str(e) else 4)
        os._exit(5)
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 3
    assert list(tmp_path.glob(f"small/{FOLDER}/*.spectra32.*")) and not list(tmp_path.glob("small/**/*.partial"))
    alds.compress_checkpoint(llama / "dense", tmp_path / "small", **OPTIONS)
    assert checkpoints.contents(tmp_path / "small") == checkpoints.contents(llama / "small")


def stopped(monkeypatch, phase, source, output, **options):
    """Start a job that is stopped before a phase of it."""
    with monkeypatch.context() as patch:
        patch.setattr(factors_and_files, phase, lambda *arguments: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            alds.compress_checkpoint(source, output, **{**OPTIONS, **options})


def rewrite(folder, change, *names):
    """Change tensors of a checkpoint in place: all whose names hold one of ``names``."""
    for path in sorted(folder.glob("*.safetensors")):
        tensors = load_file(path)
        changed = {k: change(v) if any(n in k for n in names) else v for k, v in tensors.items()}
        save_file(changed, path, {"format": "pt"})


@pytest.mark.parametrize("phase", ["find_plan", "find_factors", "write_files", "write_rest", None])
@pytest.mark.parametrize("names", [slow("embed_tokens"), "up_proj", slow("norm")])
def test_an_input_that_has_changed_is_refused(copied, tmp_path, monkeypatch, phase, names):
    if phase is None:
        alds.compress_checkpoint(copied, tmp_path / "small", **OPTIONS)
    else:
        stopped(monkeypatch, phase, copied, tmp_path / "small")
    rewrite(copied, lambda t: 2 * t + 1, names)
    with pytest.raises(errors.ArgumentError, match=rf"the tensor '.*{names}.*' has changed since this job began"):
        alds.compress_checkpoint(copied, tmp_path / "small", **OPTIONS)


def test_an_input_that_was_written_again_is_not_changed(copied, tmp_path, monkeypatch, llama):
    stopped(monkeypatch, "find_factors", copied, tmp_path / "small")
    rewrite(copied, lambda t: t, "up_proj")
    alds.compress_checkpoint(copied, tmp_path / "small", **OPTIONS)
    for name in ("config.json", "model.safetensors.index.json", "alds_plan.json"):
        assert (tmp_path / "small" / name).read_bytes() == (llama / "small" / name).read_bytes()
    (copied / "tokenizer.json").write_text("{}")
    with pytest.raises(errors.ArgumentError, match="holds another job .others="):
        alds.compress_checkpoint(copied, tmp_path / "small", **OPTIONS)


def flip(path):
    path.write_bytes(path.read_bytes()[:-1] + bytes([path.read_bytes()[-1] ^ 1]))


@pytest.mark.parametrize(
    ("phase", "pattern", "damage"),
    [
        ("write_files", "*.factors.safetensors", flip),
        slow("write_files", "*.factors.safetensors", lambda p: p.write_bytes(p.read_bytes()[:-9])),
        slow("write_files", "*.report.safetensors", lambda p: p.write_bytes(b"")),
        slow("find_factors", "*.exact.*.safetensors", lambda p: p.write_bytes(p.read_bytes()[:-9])),
        slow("write_files", "*.spectra32.safetensors", lambda p: p.write_bytes(p.read_bytes()[:-9])),
        ("find_factors", "alds_plan.json", lambda p: p.write_text("{}")),
        ("find_factors", "input.json", lambda p: p.write_text("[")),
    ],
)
def test_a_damaged_journal_is_noticed_and_what_to_do_helps(llama, tmp_path, monkeypatch, phase, pattern, damage):
    stopped(monkeypatch, phase, llama / "dense", tmp_path / "small")
    path = min((tmp_path / "small" / FOLDER).glob(pattern))
    damage(path)
    with pytest.raises(errors.FileFormatError, match=rf"{path.name}' is damaged.*remove") as e:
        alds.compress_checkpoint(llama / "dense", tmp_path / "small", **OPTIONS)
    path.unlink() if "remove it" in str(e.value) else shutil.rmtree(tmp_path / "small")
    alds.compress_checkpoint(llama / "dense", tmp_path / "small", **OPTIONS)
    assert checkpoints.contents(tmp_path / "small") == checkpoints.contents(llama / "small")


def test_files_that_are_gone(llama, tmp_path, monkeypatch):
    stopped(monkeypatch, "write_rest", llama / "dense", tmp_path / "small")
    first_shard(tmp_path / "small").write_bytes(b"zz")
    alds.compress_checkpoint(llama / "dense", tmp_path / "small", **OPTIONS)  # written again
    assert checkpoints.contents(tmp_path / "small") == checkpoints.contents(llama / "small")
    for name in (first_shard(tmp_path / "small").name, "alds_plan.json"):
        kept = (tmp_path / "small" / name).read_bytes()
        (tmp_path / "small" / name).unlink()
        with pytest.raises(errors.FileFormatError, match=f"{name}' is gone or damaged"):
            alds.compress_checkpoint(llama / "dense", tmp_path / "small", **OPTIONS)
        (tmp_path / "small" / name).write_bytes(kept)
    (tmp_path / "lost").mkdir()
    stopped(monkeypatch, "find_plan", llama / "dense", tmp_path / "lost")
    (tmp_path / "lost" / FOLDER / "alds_job.json").unlink()
    with pytest.raises(errors.ArgumentError, match="has lost its alds_job.json"):
        alds.compress_checkpoint(llama / "dense", tmp_path / "lost", **OPTIONS)


HOSTS = """
set -e
ip netns add {a}; ip netns add {b}
trap 'ip netns del {a}; ip netns del {b}' EXIT
ip link add veth1 netns {a} type veth peer name veth2 netns {b}
ip -n {a} addr add 10.99.0.1/24 dev veth1; ip -n {b} addr add 10.99.0.2/24 dev veth2
for host in {a} {b}; do ip -n $host link set lo up; done
ip -n {a} link set veth1 up; ip -n {b} link set veth2 up
run() {{
  ip netns exec $1 env OMP_NUM_THREADS=1 GLOO_SOCKET_IFNAME=$2 TP_SOCKET_IFNAME=$2 {python} -m torch.distributed.run \\
    --nnodes 2 --node-rank $3 --nproc-per-node 1 --master-addr 10.99.0.1 --master-port 29511 \\
    -m alds_fast compress {source} --params 0.7 -o {output} --max-shard-gb 0.00006
}}
run {b} veth2 1 & run {a} veth1 0
wait $!
"""


def _can_make_hosts():
    name = f"alds{os.getpid()}"
    made = shutil.which("ip") and subprocess.run(["ip", "netns", "add", name], capture_output=True).returncode == 0
    return bool(made) and subprocess.run(["ip", "netns", "del", name], capture_output=True).returncode == 0


@pytest.mark.slow
@pytest.mark.skipif(not _can_make_hosts(), reason="no network namespaces can be made here (needs ip and root)")
def test_two_hosts(tmp_path, llama):
    names = {"a": f"alds{os.getpid()}a", "b": f"alds{os.getpid()}b"}
    script = HOSTS.format(**names, python=sys.executable, source=llama / "dense", output=tmp_path / "small")
    run = subprocess.run(["bash", "-c", script], capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr
    assert checkpoints.contents(tmp_path / "small") == checkpoints.contents(llama / "small")
