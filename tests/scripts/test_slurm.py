"""The Slurm script with stand-ins for the programs of a cluster: what it starts on a machine, and when a training resumes."""

import os
import subprocess
from collections.abc import Callable

import pytest
from conftest import REPOSITORY

SCRIPT = REPOSITORY / "scripts/launch/slurm_train.sh"
PROGRAMS = {
    "scontrol": 'test "$*" = "show hostnames node[1-2]" && printf "node1\\nnode2\\n"',
    "srun": 'shift; exec "$@"',  # on one of the machines; the first word is a flag of its own
    "accelerate-launch": 'printf "%s\\n" "$@"',
}
JOB = {
    "SLURM_JOB_NODELIST": "node[1-2]", "SLURM_JOB_ID": "41", "SLURM_GPUS_ON_NODE": "4", "SLURM_NNODES": "2",
    "SLURM_NODEID": "1",
}  # fmt: skip


@pytest.fixture
def launch(tmp_path) -> Callable[..., tuple[list[str], list[str]]]:
    """launch(*words): the words of the launcher and those of train.py on the second machine; the job runs in tmp_path, with
    other variables where job={...} names some."""
    programs = tmp_path / "programs"
    programs.mkdir()
    for name, line in PROGRAMS.items():
        (programs / name).write_text(f"#!/bin/sh\n{line}\n")
        (programs / name).chmod(0o755)
    environment = {**os.environ, **JOB, "PATH": f"{programs}:{os.environ['PATH']}"}

    def call(*words: str, job: dict[str, str | None] | None = None) -> tuple[list[str], list[str]]:
        variables = {name: value for name, value in {**environment, **(job or {})}.items() if value is not None}
        done = subprocess.run(["bash", SCRIPT, *words], cwd=tmp_path, env=variables, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        lines = done.stdout.splitlines()
        at = lines.index("train.py")
        return lines[:at], lines[at + 1 :]

    return call


def test_words_of_the_launcher_and_of_the_training(launch):
    words = ["-c", "configs/toy.yaml", "model.args={width: 16}", "-mp", "no"]
    launcher, training = launch(*words)
    assert training == words
    flags = dict(zip(launcher[1::2], launcher[2::2], strict=True))
    assert launcher[0] == "--multi_gpu" and flags == {
        "--rdzv_backend": "static", "--num_machines": "2", "--machine_rank": "1", "--num_processes": "8",
        "--main_process_ip": "node1", "--main_process_port": "20041",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("nodes", "gpus", "processes"), [("1", "1", "1"), ("1", None, "1"), ("1", "2", "2"), ("2", "1", "2"), ("2", None, "2")]
)
def test_single_process_is_not_multi_gpu(launch, nodes, gpus, processes):
    """Accelerate refuses that flag for one process."""
    launcher, _ = launch("-c", "configs/toy.yaml", job={"SLURM_NNODES": nodes, "SLURM_GPUS_ON_NODE": gpus})
    assert launcher[launcher.index("--num_processes") + 1] == processes
    assert ("--multi_gpu" in launcher) == (processes != "1") and "" not in launcher


@pytest.mark.parametrize(
    "words",
    [
        ["-c", "configs/toy.yaml", "-e", "runs/mine"],
        ["--exp_dir", "runs/mine", "-c", "configs/toy.yaml"],
        ["-c", "configs/toy.yaml", "--exp_dir=runs/mine", "train.steps=3"],
        ["-c", "configs/mine.yaml", "train.steps=3"],
        ["train.steps=3", "--config", "/shared/configs/mine.yaml"],
        ["--config=configs/mine.yaml"],
    ],
)
def test_run_that_has_begun_is_resumed(launch, tmp_path, words):
    """Whether its folder is named or that of the configuration's name."""
    run = tmp_path / "runs/mine"
    assert launch(*words)[1] == words
    run.mkdir(parents=True)
    assert launch(*words)[1] == words
    (run / "config.yaml").touch()
    assert launch(*words)[1] == [*words, "-r", "latest"]
