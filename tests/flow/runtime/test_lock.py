"""Two commands in one folder: one of them writes, the other is refused in a line that names it; nothing is mixed."""

import importlib
import json
import multiprocessing
import os
import random
import re
import signal
import subprocess
import sys
import time
from multiprocessing.connection import Connection
from pathlib import Path

import pytest
import torch
import yaml
from conftest import MAINS, REPOSITORY, TINY_TRAIN, fail, run_script, succeed, wait_until

import models
from configs import loading
from configs.errors import UserError
from flow.runtime import distributed, files, lock
from flow.runtime.errors import cli_main
from flow.sampling import locate, snapshot
from flow.training import checkpoint
from scripts.dev import fault_injection

PAIRS = int(os.environ.get("FLOW_LOCK_PAIRS", "20"))  # of simultaneous starts, of each command
COMMANDS = (
    "train", "train_vae", "sample", "evaluate", "make_pairs", "cache_latents", "optimize_grid", "rectify", "export_images",
    "animate", "compare", "solver_study",
)  # fmt: skip
VAE = [
    "data.name=digits", "autoencoder.channels=[8, 8]", "autoencoder.latent_channels=2", "autoencoder.blocks=1", "train.steps=4",
    "train.batch_size=16", "train.log_every_steps=1", "train.checkpoint_every_steps=2", "train.log_with=[]", "preview_images=4",
]  # fmt: skip


@pytest.fixture(scope="session")
def points(tmp_path_factory) -> Path:
    """The snapshot of an untrained flow of points."""
    path = tmp_path_factory.mktemp("points") / "points.safetensors"
    cfg = loading.load("configs/toy.yaml", ["model.args={width: 16}"])
    net = models.build(cfg.model.name, (2,), cfg.model.args)
    torch.nn.init.normal_(next(net.parameters()), std=0.1)
    snapshot.save(path, net.state_dict(), cfg, (2,), 1, 1)
    return path


@pytest.fixture
def command(request, tiny_run, points, tmp_path):
    """command(name, folder, number): the arguments of a command that writes to the folder. Where the outcome depends on a
    seed, it is that of the `number`."""

    def arguments(name: str, folder: Path, number: int = 0) -> list:
        weights = ["--weights", tiny_run]
        if name == "optimize_grid":
            weights = ["--weights", folder / "net.safetensors"]
            if not weights[1].exists():
                folder.mkdir(exist_ok=True)
                weights[1].write_bytes(locate.find(tiny_run).read_bytes())
        if name == "rectify":  # its chain ends with the first command, which marks where it begins and ends
            (tmp_path / "chain.sh").write_text(f"echo begin >> {folder}.txt; sleep 0.3; echo end >> {folder}.txt; exit 7")
            reflow = {"data": {"name": "pairs"}, "flow": {"coupling": "paired"}}
            stages: dict = {"pairs": {"pairs": {"n_pairs": 10}}}
            for stage, content in {"first": {}, "reflow": reflow}.items():
                (tmp_path / f"{stage}.yaml").write_text(yaml.safe_dump(content))
                stages[stage] = {"config": str(tmp_path / f"{stage}.yaml")}
            chain = {"stages": stages, "routes": {"reflow": {"stages": ["first", "pairs", "reflow"]}}}
            (tmp_path / "rectify.yaml").write_text(yaml.safe_dump(chain | {"feature_extractor": "digits"}))
        return {
            "train": lambda: [*TINY_TRAIN, "-e", folder, f"seed={number}"],
            "train_vae": lambda: [*VAE, "-e", folder, f"seed={number}"],
            "sample": lambda: [*weights, "--n_samples", 30, "--sampling_steps", 2, "--save_dir", folder, "--seed", number],
            "make_pairs": lambda: [
                *weights, "--n_pairs", 40, "--shard_pairs", 10, "--sampling_steps", 2, "--save_dir", folder, "--seed", number,
            ],
            "cache_latents": lambda: [
                "--vae", request.getfixturevalue("vae_folder"), "--save_dir", folder, "data.name=digits", "--shard_images",
                300 + number,
            ],
            "export_images": lambda: ["--save_dir", folder, "data.name=digits", "--n_images", 200, "--size", 8 + number],
            "evaluate": lambda: [
                *weights, "--n_samples", 50, "--sampling_steps", 1, 2, "--feature_extractor", "digits", "--out", folder,
                "--metrics", "fid", f"data.root={tmp_path}",
            ],
            "optimize_grid": lambda: [
                *weights, "--methods", "euler", "--steps", 2, "--n_images", 4, "--reference_steps", 16, "--evaluations", 5,
            ],
            "rectify": lambda: ["-c", tmp_path / "rectify.yaml", f"folder={folder}", "--launcher", f"sh {tmp_path}/chain.sh"],
            "animate": lambda: [*weights, "--out", folder, "--n", 10, "--frames", 2],
            "compare": lambda: [
                "--weights", points, "--out", folder, "--n_samples", 100, "--frames", 2, "--sampling_steps", 2,
            ],
            "solver_study": lambda: [
                *weights, "--out", folder, "--n_images", 2, "--methods", "euler", "--grids", "uniform", "--sampling_steps", 2,
            ],
        }[name]()  # fmt: skip

    return arguments


def names(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("name", COMMANDS)
def test_a_folder_that_is_being_written_is_refused(name, command, error, monkeypatch, tmp_path):
    monkeypatch.setattr(lock, "PATIENCE_SECONDS", 0.1)
    folder = tmp_path / "out"
    locked = tmp_path / f"{files.TEMPORARY}out" if name == "export_images" else folder  # which it renames in the end
    ask = command(name, folder)
    with lock.folder(locked):
        before = names(locked)
        line = error(name, *ask)
        assert names(locked) == before >= {files.LOCK}
    holder = rf"{locked}: process {os.getpid()} on \S+ has been writing here since \d{{4}}-\d\d-\d\d \d\d:\d\d:\d\d "
    assert re.search(holder, line), line
    assert not (locked / files.LOCK).exists()


def test_a_lock_that_is_left_in_a_moment_is_waited_for(tmp_path):
    """As by the child of a command that was killed."""
    hold = "file = open(sys.argv[1], 'a'); fcntl.flock(file, fcntl.LOCK_EX); print('held', flush=True); time.sleep(0.5)"
    words = [sys.executable, "-c", f"import fcntl, sys, time; {hold}", tmp_path / files.LOCK]
    holder = subprocess.Popen(words, stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None and holder.stdout.readline() == "held\n"
    with lock.folder(tmp_path):
        assert holder.wait(60) == 0


def test_concurrent_start_is_refused(main_of, error, monkeypatch, tmp_path, tiny_run):
    """Both commands saw a folder that did not exist; the other one has finished when this one gets the lock."""
    run = tmp_path / "run"
    start = distributed.build_training_accelerator

    def slow_start(*args):
        run.mkdir()
        (run / "config.yaml").write_text("of the other")
        return start(*args)

    monkeypatch.setattr(distributed, "build_training_accelerator", slow_start)
    assert f"-e {run}: exists already" in error("train", *TINY_TRAIN, "-e", run)
    assert names(run) == {"config.yaml"}


def test_unused_folder_is_removed(tmp_path):
    """A command that fails removes a folder that it made and wrote nothing to."""
    for folder in (tmp_path / "a" / "b" / "c", tmp_path / "a"):
        with pytest.raises(KeyError), lock.folder(folder):
            assert names(folder) == {files.LOCK}
            raise KeyError
        assert list(tmp_path.iterdir()) == []
    with lock.folder(tmp_path / "a"):
        (tmp_path / "a" / "b").mkdir()
    assert names(tmp_path) == set() and (tmp_path / "a" / "b").is_dir()


def test_unfinished_folder_is_renamed_or_removed(tmp_path):
    out = tmp_path / "out"
    with pytest.raises(KeyError), lock.unfinished(out) as new:
        (new / "a.txt").touch()
        raise KeyError
    assert list(tmp_path.iterdir()) == []
    with lock.unfinished(out) as new:
        (new / "a.txt").touch()
    assert list(tmp_path.iterdir()) == []
    with lock.unfinished(out) as new:
        (new / "a.txt").touch()
        files.atomic_rename_dir(new, out)
    assert list(tmp_path.iterdir()) == [out] and names(out) == {"a.txt"}


def test_unfinished_folder_has_one_writer(monkeypatch, tmp_path):
    monkeypatch.setattr(lock, "PATIENCE_SECONDS", 0.1)
    with lock.unfinished(tmp_path / "out") as new:
        (new / "a.txt").touch()
        refusal = pytest.raises(UserError, match=f"process {os.getpid()} on .* has been writing here since")
        with refusal, lock.unfinished(tmp_path / "out"):
            pass
        assert names(new) == {"a.txt"}


def test_unfinished_folder_of_a_killed_process(tmp_path):
    """What it wrote is removed."""
    with lock.unfinished(tmp_path / "out") as new:
        pass
    new.mkdir(parents=True)
    for leftover in (new / "half.txt", new.parent / files.LOCK):
        leftover.write_text("of a killed process")
    with lock.unfinished(tmp_path / "out") as again:
        assert again == new and names(new) == set()
    assert names(tmp_path) == set() and not new.exists()


def hold(folder: Path, told: Connection) -> None:
    """What a process runs that holds the lock of a folder, and its child."""
    with lock.folder(folder):
        os.fork()
        told.send(os.getpid())
        time.sleep(60)


def test_a_killed_process_leaves_no_lock(monkeypatch, tmp_path):
    """Though its child lives on, as the processes that read images do."""
    monkeypatch.setattr(lock, "PATIENCE_SECONDS", 0.1)
    told, tell = multiprocessing.Pipe(duplex=False)
    process = multiprocessing.get_context("fork").Process(target=hold, args=(tmp_path / "out", tell))
    process.start()
    tell.close()  # here: a process that fails ends the waiting below
    pids = [told.recv() for _ in range(2)]
    try:
        with pytest.raises(UserError, match=f"process {process.pid} on "), lock.folder(tmp_path / "out"):
            pass
        process.kill()
        process.join()
        assert names(tmp_path / "out") == {files.LOCK}
        with lock.folder(tmp_path / "out"):
            pass
        assert names(tmp_path / "out") == set()
    finally:
        for pid in set(pids) - {process.pid}:
            os.kill(pid, signal.SIGKILL)


def test_a_file_system_without_locks_is_named(error, monkeypatch, tmp_path):
    """No lock that outlives its process takes the place of the system's."""
    import fcntl

    def no_flock(descriptor: int, operation: int) -> None:
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", no_flock)
    line = error("train", *TINY_TRAIN, "-e", tmp_path / "run")
    assert f"{tmp_path / 'run'}: cannot be written and locked: Function not implemented" in line


@pytest.mark.slow
def test_all_processes_of_a_refused_command_leave(tmp_path):
    with lock.folder(tmp_path / "run"):
        result = run_script("train.py", *TINY_TRAIN, "-e", tmp_path / "run", processes=2)
    lines = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and "has been writing here since" in lines[0], result.stderr
    assert "exitcode  : 2" in result.stderr
    assert f'File "{REPOSITORY / "flow"}' not in result.stderr  # the traceback of the launcher alone
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_an_evaluation_beside_a_training(tmp_path):
    """The folder that is written is locked, not the run that is read."""
    run = tmp_path / "run"
    train = [sys.executable, "train.py", *TINY_TRAIN, "train.steps=100_000", "-e", str(run)]
    process = subprocess.Popen(train, cwd=REPOSITORY, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        wait_until(lambda: list((run / "snapshots").glob("step_*.safetensors")), process)
        ask = ["--n_samples", "20", "--sampling_steps", "1", "--feature_extractor", "digits", "--metrics", "fid"]
        succeed("evaluate.py", "--weights", run, *ask)
        assert process.poll() is None
        assert f"process {process.pid} on " in fail("train.py", "-e", run, "-r", "latest")
    finally:
        process.kill()
        process.wait()


# ---- simultaneous starts


def live(module: str, arguments: list[str], log: str, patience: float) -> None:
    """What a forked process runs: the main of a script, imported already unless the fork server is of another test."""
    with open(log, "a", encoding="utf-8") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.argv = [f"{module}.py", *arguments]
    os.chdir(REPOSITORY)
    lock.PATIENCE_SECONDS = patience
    cli_main(importlib.import_module(module).main)


def differences(one: Path, other: Path) -> list[str]:
    """fault_injection.compare without clocks and without the folder's name; distances may be rounded differently."""
    different = [line for line in fault_injection.compare(one, other) if not line.startswith("results.")]
    tables = [rows(folder) for folder in (one, other)]
    return different + ([] if tables[0] == tables[1] else ["results.jsonl differs"])


def rows(folder: Path) -> list[dict]:
    """Those of evaluate.py."""
    path = folder / "results.jsonl"
    found = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    return [row | {"seconds": 0, "metrics": {k: round(v, 6) for k, v in row["metrics"].items()}} for row in found]


@pytest.mark.slow
@pytest.mark.parametrize("name", COMMANDS)
def test_simultaneous_starts_mix_nothing(name, command, monkeypatch, tmp_path):
    """Of each pair one command writes what it writes alone; the other is refused, or comes after it and changes nothing."""
    monkeypatch.setenv("FLOW_NUM_THREADS", "1")
    modules = {name: MAINS.get(name, f"scripts.{name}") for name in COMMANDS}
    forks = multiprocessing.get_context("forkserver")
    forks.set_forkserver_preload(["sklearn.datasets", "diffusers", *modules.values()])
    rng, log = random.Random(name), str(tmp_path / "log.txt")

    def start(folder: Path, number: int, patience: float = 3.0):
        process = forks.Process(target=live, args=(modules[name], [*map(str, command(name, folder, number))], log, patience))
        process.start()
        return process

    alone = []
    for number in (0, 1):
        alone.append(tmp_path / f"alone_{number}" / "run")
        alone[-1].parent.mkdir()
        process = start(alone[-1], number)
        process.join()
        assert process.exitcode == (7 if name == "rectify" else 0), Path(log).read_text()
    codes, refusals = [], 0
    for pair in range(PAIRS):
        folder = tmp_path / f"pair_{pair}" / "run"
        folder.parent.mkdir()
        first, second = pair % 2, 1 - pair % 2
        before = Path(log).read_text().count("has been writing here since")
        processes = {first: start(folder, first, rng.choice([0.1, 0.1, 3.0]))}
        time.sleep(rng.choice([0, 0, 0.01, 0.1, 0.4]))
        processes[second] = start(folder, second, rng.choice([0.1, 0.1, 3.0]))
        for process in processes.values():
            process.join()
        codes.append(tuple(sorted(process.exitcode for process in processes.values())))
        refusals += Path(log).read_text().count("has been writing here since") - before
        if name == "rectify":
            marks = Path(f"{folder}.txt").read_text().split()
            assert codes[-1] in ((2, 7), (7, 7)) and marks == ["begin", "end"] * codes[-1].count(7)
            continue
        winners = [number for number, process in processes.items() if process.exitcode == 0]
        assert codes[-1] == (0, 2) or (codes[-1] == (0, 0) and name not in ("train", "train_vae", "sample", "make_pairs"))
        different = [differences(alone[number], folder) for number in winners]
        assert [] in different, different
        assert not list(folder.rglob(".tmp-*")) and not (folder / files.LOCK).exists()
        if name in ("train", "train_vae"):
            assert all(checkpoint.verify(path) is None for path in checkpoint.list_checkpoints(folder / "checkpoints"))
    assert "Traceback" not in Path(log).read_text()
    counts = {pair: codes.count(pair) for pair in sorted(set(codes))}
    print(f"{name}: {PAIRS} pairs, exit codes {counts}, {refusals} refused by the lock")
