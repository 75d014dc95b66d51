"""Several processes: stopped by the scheduler, one of them dead or hung, another number of them after a resume."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from conftest import REPOSITORY, TINY_RUN, TINY_TRAIN, succeed, wait_until
from safetensors.torch import load_file

from flow.runtime import step_names
from flow.sampling import snapshot
from flow.training import checkpoint
from flow.training.logging import read_metrics

MLP = [*TINY_RUN, "model.name=mlp", "model.args={width: 64, depth: 2}", "train.log_every_steps=1"]
LAUNCH = str(Path(sys.executable).with_name("accelerate-launch"))
LAUNCHER = [LAUNCH, "--multi_gpu", "--main_process_port", "0"]


def start(run: Path, *overrides: str, processes: int = 2) -> subprocess.Popen:
    """A long training of so many processes by accelerate-launch; returns once it has taken some steps."""
    launcher = [LAUNCH, "--config_file", "configs/accelerate/one_cpu.yaml"] if processes == 1 else LAUNCHER
    command = [*launcher, "--num_processes", str(processes), "train.py", *MLP, "train.steps=1_000_000"]
    command += ["train.checkpoint_every_steps=0", "-e", str(run), *overrides]
    environment = {**os.environ, "FLOW_NUM_THREADS": "1"}
    process = subprocess.Popen(
        command, cwd=REPOSITORY, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    wait_until(lambda: (run / "metrics.jsonl").exists() and len(read_metrics(run / "metrics.jsonl")) >= 5, process)
    return process


def workers(process: subprocess.Popen) -> list[psutil.Process]:
    """The processes that train, by rank."""
    children = [p for p in psutil.Process(process.pid).children(recursive=True) if "train.py" in p.cmdline()]
    return sorted(children, key=lambda p: int(p.environ()["RANK"]))


def end(process: subprocess.Popen) -> str:
    """Wait for the launcher; what everybody said."""
    said, _ = process.communicate(timeout=90)
    return said


@pytest.mark.slow
def test_sigterm_to_launcher_saves_one_checkpoint(tmp_path, capsys):
    """What Slurm and spot machines send."""
    run = tmp_path / "run"
    process = start(run)
    family = workers(process)
    assert len(family) == 2
    since = time.perf_counter()
    process.send_signal(signal.SIGTERM)
    said = end(process)
    seconds = time.perf_counter() - since
    assert process.returncode != 0
    assert not any(p.is_running() for p in family)
    (saved,) = checkpoint.list_checkpoints(run / "checkpoints")
    assert checkpoint.verify(saved) is None
    step = read_metrics(run / "metrics.jsonl")[-1]["step"]
    assert step_names.step_of(saved) == step  # all processes agreed on it
    assert f"stopped by SIGTERM; the latest checkpoint is {saved}; resume with:" in said
    assert not list(run.rglob(".tmp-*"))
    (resume,) = set(re.findall(r"resume with: (.+)", said))
    environment = {**os.environ, "FLOW_NUM_THREADS": "1"}
    again = subprocess.run(
        f"{resume} train.steps={step + 2}", shell=True, cwd=REPOSITORY, env=environment, capture_output=True, text=True
    )
    assert again.returncode == 0, again.stderr
    assert "= 2 process(es) x" in again.stdout and f"finished step {step + 2}" in again.stdout
    with capsys.disabled():
        print(f"\nSIGTERM to the end: {seconds:.1f} s")


@pytest.mark.slow
def test_sigterm_to_launcher_of_one_process(tmp_path):
    """Accelerate passes no signal on to a single process, which ends with the launcher all the same, with a checkpoint."""
    process = start(tmp_path / "run", processes=1)
    (trainer,) = (p for p in psutil.Process(process.pid).children(recursive=True) if "train.py" in p.cmdline())
    process.send_signal(signal.SIGTERM)
    said = end(process)
    trainer.wait(timeout=60)
    assert "stopped by SIGTERM; the latest checkpoint is" in said
    assert len(checkpoint.list_checkpoints(tmp_path / "run/checkpoints")) == 1


@pytest.mark.slow
@pytest.mark.parametrize(("blow", "rank"), [(signal.SIGSTOP, 0), (signal.SIGSTOP, 1), (signal.SIGKILL, 0), (signal.SIGKILL, 1)])
def test_lost_process_ends_the_others(tmp_path, capsys, blow, rank):
    """A hung or dead process ends the others with a message."""
    run = tmp_path / "run"
    process = start(run, "train.timeout_minutes=0.05")
    family = workers(process)
    since = time.perf_counter()
    family[rank].send_signal(blow)
    survivor = family[1 - rank]
    while survivor.is_running() and survivor.status() != psutil.STATUS_ZOMBIE:
        assert time.perf_counter() - since < 600  # against a hang of the test itself
        time.sleep(0.05)
    seconds = time.perf_counter() - since
    said = end(process)
    by_launcher = blow == signal.SIGKILL and re.search(rf"exitcode +: -\d+ \(pid: {survivor.pid}\)", said)
    assert by_launcher or "error: another process has ended, hangs or cannot be reached" in said, said
    assert 'train.py", line' not in said, said  # the launcher's own traceback comes after it
    assert process.returncode != 0
    with capsys.disabled():
        print(f"\n{blow.name} of process {rank}: the other one ended after {seconds:.1f} s, the launcher after "
              f"{time.perf_counter() - since:.1f} s")  # fmt: skip


SPLITS = [(1, 1), (1, 4), (2, 1), (2, 2), (4, 1)]  # processes, micro-batches


@pytest.mark.slow
def test_splits_of_global_batch_are_one_run(tmp_path, capsys):
    """Started on two processes and resumed on each split, and from the start on each: the same but for rounding."""
    steps = ["train.steps=40", "train.checkpoint_every_steps=20", "train.log_every_steps=1", "train.keep_checkpoints=0"]
    two = tmp_path / "two"
    assert "FutureWarning" not in succeed("train.py", *TINY_TRAIN, *steps, "-e", two, processes=2).stderr
    reference = load_file(checkpoint.list_checkpoints(two / "checkpoints")[-1] / "model.safetensors")
    size = max(value.abs().max().item() for value in reference.values())
    bound = 0.0
    for processes, gradient_accumulation_steps in SPLITS:
        resumed, fresh = (tmp_path / f"{kind}_{processes}_{gradient_accumulation_steps}" for kind in ("resumed", "fresh"))
        shutil.copytree(two, resumed, ignore=shutil.ignore_patterns("step_00000040*"))
        split = [f"train.gradient_accumulation_steps={gradient_accumulation_steps}"]
        succeed("train.py", "-e", resumed, "-r", "latest", *split, processes=processes)
        succeed("train.py", *TINY_TRAIN, *steps, *split, "-e", fresh, processes=processes)
        for run in (resumed, fresh):
            rows, expected = (read_metrics(r / "metrics.jsonl") for r in (run, two))
            assert [row["step"] for row in rows] == list(range(1, 41))
            for row, right in zip(rows, expected, strict=True):
                assert row["loss"] == pytest.approx(right["loss"], rel=1e-4)
            weights = load_file(checkpoint.list_checkpoints(run / "checkpoints")[-1] / "model.safetensors")
            bound = max(bound, *((weights[k] - reference[k]).abs().max().item() for k in reference))
            assert snapshot.load(run).step == 40
    with capsys.disabled():
        print(f"\nelastic: the largest difference of a weight after 40 steps is {bound:.1e}, of weights up to {size:.2f}")
    assert bound < 1e-4
