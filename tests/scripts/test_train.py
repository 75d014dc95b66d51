"""Training: what was killed or stopped goes on to the same end, and the number of processes changes nothing but rounding."""

import json
import os
import pty
import re
import shlex
import shutil
import signal
import subprocess
import sys
from contextlib import suppress
from functools import partial
from pathlib import Path

import psutil
import pytest
import torch
from conftest import DROPOUT, REPOSITORY, TINY_TRAIN, run_here, succeed, wait_until
from safetensors.torch import load_file

from flow.runtime import files, step_names
from flow.runtime.errors import cli_main
from flow.sampling import images, locate, snapshot
from flow.training import checkpoint
from flow.training.logging import read_metrics
from flow.training.trainer import Callback
from scripts.dev import fault_injection

LONGER = [*TINY_TRAIN, DROPOUT, "train.steps=8", "train.checkpoint_every_steps=4", "train.log_every_steps=3"]
TO_KILL = [*LONGER, "train.steps=24", "train.checkpoint_every_steps=12", "train.log_every_steps=9"]


def newest(run: Path) -> Path:
    return checkpoint.list_checkpoints(run / "checkpoints")[-1]


def assert_same_state(run_a: Path, run_b: Path) -> None:
    """Weights, moving average, optimizer state and counters of the newest checkpoint, to the bit."""
    assert fault_injection.compare(newest(run_a), newest(run_b)) == []
    assert {"model.safetensors", "ema.safetensors", "optimizer.bin"} <= {path.name for path in newest(run_a).iterdir()}


def losses(run: Path) -> list[dict]:
    return fault_injection.losses(run / "metrics.jsonl")


def kill_after_first_checkpoint(run: Path, launcher: list[str]) -> None:
    """Start a training run and kill all of its processes once its first checkpoint is there."""
    command = [sys.executable, *launcher, "train.py", *TO_KILL, "-e", str(run)]
    process = subprocess.Popen(command, cwd=REPOSITORY, stderr=subprocess.PIPE, text=True, start_new_session=True)
    wait_until((run / "checkpoints" / "step_00000012").exists, process)
    family = [*psutil.Process(process.pid).children(recursive=True), process]  # the launcher alone would leave its children
    for member in family:
        member.kill()
    process.communicate()
    assert not (run / "checkpoints" / "step_00000024").exists(), "the run was over before the signal"


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory) -> Path:
    run = tmp_path_factory.mktemp("training") / "run"
    run_here("train", *LONGER, "-e", run)
    return run


def test_rows_where_there_is_no_terminal(here, tmp_path):
    printed = here("train", *TINY_TRAIN, "-e", tmp_path / "run")
    rows = [line for line in printed.splitlines() if line.startswith("step ")]
    assert [row.partition("  ")[0] for row in rows] == ["step 2 of 4", "step 4 of 4"] and "images/s" in rows[0]
    assert "\r" not in printed


class Terminate(Callback):
    """SIGTERM to this process after each row of metrics."""

    def on_log(self, trainer, metrics):
        os.kill(os.getpid(), signal.SIGTERM)


def test_sigterm_saves_and_suggests_resume(main_of, here, capsys, tmp_path, uninterrupted):
    """A run stopped by SIGTERM saves and prints the command that resumes it, as if it had not been stopped."""
    run = tmp_path / "run"
    main = main_of("train", *LONGER, "-e", run)
    with pytest.raises(SystemExit) as left:
        cli_main(partial(main, [Terminate()]))
    assert left.value.code == 128 + signal.SIGTERM
    (saved,) = checkpoint.list_checkpoints(run / "checkpoints")
    assert step_names.step_of(saved) == 3 and checkpoint.verify(saved) is None
    printed = capsys.readouterr()
    assert "Traceback" not in printed.err
    (resume,) = re.findall(r"resume with: (.+)", printed.out)
    program, script, *arguments = shlex.split(resume)
    assert shutil.which(program) and Path(script).resolve() == REPOSITORY / "train.py"
    here("train", *arguments)
    assert_same_state(run, uninterrupted)
    assert losses(run) == losses(uninterrupted)


def start_on_a_terminal(command: list[str]) -> tuple[psutil.Process, int]:
    """Start a command as the leader of a session on a terminal of its own: its process, and the terminal's other end."""
    pid, terminal = pty.fork()
    if pid == 0:
        signal.signal(signal.SIGHUP, signal.SIG_DFL)  # whatever the tests were started with
        os.chdir(REPOSITORY)
        os.execv(command[0], command)
    os.set_blocking(terminal, False)
    return psutil.Process(pid), terminal


@pytest.mark.parametrize("nohup", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_closed_terminal_stops_run(tmp_path, monkeypatch, nohup):
    """A closed terminal stops a run, unless SIGHUP is ignored."""
    monkeypatch.setenv("FLOW_NUM_THREADS", "1")
    run = tmp_path / "run"
    more = ["train.steps=60", "train.log_every_steps=5", "train.checkpoint_every_steps=0"] if nohup else ["train.steps=100_000"]
    command = [sys.executable, "train.py", *TINY_TRAIN, "train.checkpoint_every_steps=0", *more, "-e", str(run)]
    log = tmp_path / "printed.txt"
    if nohup:  # as its command does: the signal is ignored, and what is printed goes to a file
        command = ["/bin/sh", "-c", f'trap "" HUP; exec "$@" > {log} 2>&1', "sh", *command]
    process, terminal = start_on_a_terminal(command)

    def has_begun() -> bool:
        with suppress(OSError):
            os.read(terminal, 100_000)  # a terminal that nobody reads stops who writes to it
        return (run / "metrics.jsonl").exists()

    wait_until(has_begun, process)
    os.close(terminal)
    wait_until(lambda: process.status() == psutil.STATUS_ZOMBIE, process)
    code = process.wait()
    said = (run / "log.txt").read_text()
    assert checkpoint.verify(newest(run)) is None
    if nohup:
        assert code == 0 and step_names.step_of(newest(run)) == 60
    else:
        assert code == 128 + signal.SIGHUP
        assert f"stopped by SIGHUP; the latest checkpoint is {newest(run)}; resume with: " in said
        assert f"train.py -e {run} -r latest" in said


def test_two_processes_equal_one(group, tmp_path):
    """Without dropout, whose masks belong to a process, two processes compute what one does; one process goes on from the half
    of a run of two with the same batches, noise and times."""
    plain = [argument for argument in LONGER if argument is not DROPOUT]
    both, elastic, one = (tmp_path / name for name in ("both", "elastic", "one"))
    group("train", *plain, "-e", both, "train.keep_checkpoints=0")
    shutil.copytree(both, elastic, ignore=shutil.ignore_patterns("step_00000008*"))
    run_here("train", "-e", elastic, "-r", "latest")
    run_here("train", *plain, "train.gradient_accumulation_steps=2", "-e", one)
    for other in (elastic, one):
        for a, b in zip(losses(both), losses(other), strict=True):
            assert a["loss"] == pytest.approx(b["loss"], rel=1e-5)
        ema_a, ema_b = (load_file(locate.find(run)) for run in (both, other))
        assert max((ema_a[k] - ema_b[k]).abs().max().item() for k in ema_a) < 1e-4


@pytest.mark.slow
def test_two_processes_resume_to_the_same_bits(tmp_path, monkeypatch):
    monkeypatch.setenv("FLOW_NUM_THREADS", "1")
    torchrun = ["-m", "torch.distributed.run", "--nproc_per_node", "2", "--rdzv_backend", "c10d"]
    torchrun += ["--rdzv_endpoint", "localhost:0"]
    two, resumed = tmp_path / "two", tmp_path / "resumed"
    succeed("train.py", *TO_KILL, "-e", two, processes=2)
    kill_after_first_checkpoint(resumed, torchrun)
    succeed("train.py", "-e", resumed, "-r", "latest", processes=2)
    assert_same_state(resumed, two)
    assert losses(resumed) == losses(two)


def test_muon_resumes_to_the_same_bits(tmp_path):
    straight, resumed = tmp_path / "straight", tmp_path / "resumed"
    muon = ["optimizer.name=muon", "model.args.width=32", "train.steps=4", "train.checkpoint_every_steps=2"]
    run_here("train", *TINY_TRAIN, *muon, "train.keep_checkpoints=0", "-e", straight)
    shutil.copytree(straight, resumed, ignore=shutil.ignore_patterns("step_00000004*"))
    run_here("train", "-e", resumed, "-r", "latest")
    assert_same_state(resumed, straight)


def test_damaged_newest_checkpoint_is_skipped(here, tmp_path, uninterrupted):
    """A damaged newest checkpoint is named and skipped."""
    run = tmp_path / "run"
    shutil.copytree(uninterrupted, run)
    victim = run / "checkpoints" / "step_00000008" / "optimizer.bin"
    data = bytearray(victim.read_bytes())
    data[len(data) // 2] ^= 1
    victim.write_bytes(data)
    printed = here("train", "-e", run, "-r", "latest")
    assert "step_00000008 is damaged and skipped: optimizer.bin has changed" in printed
    assert "resuming from step 4" in printed
    assert_same_state(run, uninterrupted)


def test_what_lies_past_the_resumed_step_is_set_aside(here, tmp_path, tiny_run):
    """A damaged checkpoint and its snapshot are neither counted among the last ones nor taken for the newest."""
    run = tmp_path / "run"
    shutil.copytree(tiny_run, run)
    (run / "checkpoints" / "step_00000004" / "manifest.json").write_text("{}")
    (run / "samples").mkdir(exist_ok=True)
    (run / "samples" / "step_00000004.png").write_bytes(b"a picture")
    (run / "snapshots" / "step_00000002.grids.json").write_text("{}")  # of a snapshot that is deleted, and with it
    printed = here("train", "-e", run, "-r", "latest", "train.steps=3", "train.keep_checkpoints=1", "train.keep_snapshots=1")
    assert not (run / "snapshots" / "step_00000002.grids.json").exists()
    assert f"3 checkpoints, snapshots and previews past step 2 are in {run}/set_aside now" in printed
    assert newest(run).name == "step_00000003" and checkpoint.verify(newest(run)) is None
    assert locate.find(run).name == "step_00000003.safetensors"
    aside = {path.relative_to(run / "set_aside").as_posix() for path in (run / "set_aside").glob("*/*")}
    names = ("checkpoints/step_00000004", "snapshots/step_00000004.safetensors", "samples/step_00000004.png")
    assert aside == set(names)


def test_changed_options_of_the_optimizer_are_applied(here, tmp_path, tiny_run):
    """AdamW takes lr * weight_decay * w off each weight w besides the step of Adam, whose gradient is the same here."""
    decay, runs = 0.5, [tmp_path / "plain", tmp_path / "decayed"]
    for run, options in zip(runs, ([], [f"optimizer.weight_decay={decay}"]), strict=True):
        shutil.copytree(tiny_run, run)
        here("train", "-e", run, "-r", "latest", "train.steps=5", *options)
    before = load_file(newest(tiny_run) / "model.safetensors")
    plain, decayed = (load_file(newest(run) / "model.safetensors") for run in runs)
    lr = losses(runs[0])[-1]["learning_rate"]
    for name, weight in before.items():
        torch.testing.assert_close(decayed[name], plain[name] - lr * decay * weight, rtol=0, atol=1e-6)
    assert max((decayed[name] - plain[name]).abs().max().item() for name in before) > 1e-5
    here("train", "-e", runs[0], "-r", "latest", "train.steps=6", "optimizer.betas=[0.8, 0.95]", "optimizer.eps=1e-6")
    (group,) = torch.load(newest(runs[0]) / "optimizer.bin", weights_only=True)["param_groups"]
    assert (*group["betas"], group["eps"], group["weight_decay"]) == (0.8, 0.95, 1e-6, 0)


def test_kill_after_checkpoint_loses_nothing(here, tmp_path, uninterrupted):
    """A kill after a checkpoint loses neither snapshot nor preview."""
    run = tmp_path / "run"
    shutil.copytree(uninterrupted, run)
    lost, preview = locate.find(run), run / "samples" / "step_00000008.png"
    lost.unlink()
    preview.unlink()
    unfinished = run / "samples" / ".tmp-step_00000008.png"
    unfinished.write_bytes(b"half a picture")
    here("train", "-e", run, "-r", "latest")
    assert lost.read_bytes() == locate.find(uninterrupted).read_bytes()
    assert preview.read_bytes() == (uninterrupted / "samples" / preview.name).read_bytes()
    assert not unfinished.exists()


def test_kill_while_writing_preview(here, monkeypatch, tiny_run, tmp_path):
    """A copy of the folder is what a kill leaves behind, with half of a preview under its temporary name; the resumed copy
    equals the run that was never killed."""
    killed, replace = tmp_path / "killed", os.replace

    def copy_and_replace(source, target):
        if Path(target).parent.name == "samples":
            shutil.copytree(tmp_path / "run", killed)
        replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", copy_and_replace)
        here("train", *TINY_TRAIN, "-e", tmp_path / "run")
    (unfinished,) = (killed / "samples").iterdir()
    assert unfinished.name.startswith(files.TEMPORARY)
    os.truncate(unfinished, unfinished.stat().st_size // 2)
    with pytest.raises(OSError):
        images.read_png(unfinished)
    here("train", "-e", killed, "-r", "latest")
    assert fault_injection.compare(tiny_run, killed) == []


def test_run_folder_holds_what_the_design_promises(uninterrupted):
    names = {path.name for path in uninterrupted.iterdir()}
    assert {"config.yaml", "environment.json", "log.txt", "metrics.jsonl", "samples", "checkpoints", "snapshots"} <= names
    starts = json.loads((uninterrupted / "environment.json").read_text())
    assert starts[0]["processes"] == 1 and starts[0]["packages"]["torch"]
    row = read_metrics(uninterrupted / "metrics.jsonl")[-1]
    assert row["step"] == 8 and row["images"] == 8 * 32
    assert {"loss", "loss_t_0.0", "loss_t_0.9", "grad_norm", "learning_rate", "images_per_second"} <= row.keys()
    assert (uninterrupted / "samples" / "step_00000008.png").stat().st_size > 0
    assert [p.name for p in checkpoint.list_checkpoints(uninterrupted / "checkpoints")] == ["step_00000004", "step_00000008"]


def test_init_from_takes_snapshot_weights(here, tmp_path, uninterrupted):
    """With a learning rate of almost nothing, one step leaves the weights where they began."""
    run = tmp_path / "run"
    here("train", *LONGER, "-e", run, "train.steps=1", f"train.init_from={uninterrupted}", "optimizer.lr=1e-12")
    before, after = (load_file(locate.find(path)) for path in (uninterrupted, run))
    assert max((before[k] - after[k]).abs().max().item() for k in before) < 1e-6


def test_warmup_that_does_not_end_is_noted(here, tmp_path):
    said = here("train", *TINY_TRAIN, "optimizer.warmup_steps=8", "optimizer.schedule=cosine", "-e", tmp_path / "run")
    assert (
        "note: optimizer.warmup_steps=8: the learning rate rises to the last of 4 steps, and optimizer.schedule=cosine" in said
    )


def test_init_from_other_classes(here, error, tmp_path, uninterrupted):
    """A class keeps the embedding of its name, another one starts anew; labels may also come or go."""
    for name in ("3", "7"):
        (tmp_path / "data" / name).mkdir(parents=True)
        for k in range(2):
            images.write_png(tmp_path / "data" / name / f"{k}.png", torch.zeros(1, 8, 8, dtype=torch.uint8))
    first = ["train", *TINY_TRAIN, "train.steps=1", "train.batch_size=4", "optimizer.lr=1e-12"]
    only = ["data.name=folder", f"data.args={{path: {tmp_path / 'data'}, size: 8, channels: 1}}", "model.args.num_classes=auto"]
    said = here(*first, *only, f"train.init_from={uninterrupted}", "-e", tmp_path / "two")
    assert "the embeddings of the classes 0, 1, 2, 4, 5, 6, 8, 9 are left out" in said and "anew" not in said
    said = here(*first, f"train.init_from={tmp_path / 'two'}", "-e", tmp_path / "ten")
    assert "the embeddings of the classes 0, 1, 2, 4, 5, 6, 8, 9 start anew" in said
    all_ten, two, ten = (
        next(value for name, value in load_file(locate.find(run)).items() if name.endswith("label_embedding.weight"))
        for run in (uninterrupted, tmp_path / "two", tmp_path / "ten")
    )
    same = [3, 7, 10]
    assert torch.allclose(two, all_ten[same], atol=1e-6) and torch.allclose(ten[same], two, atol=1e-6)
    assert (ten - all_ten).abs().amax(1).gt(1e-3).nonzero().flatten().tolist() == [0, 1, 2, 4, 5, 6, 8, 9]
    scaled = [f"train.init_from={tmp_path / 'two'}", "model.args.data_std=0.5", "-e", tmp_path / "scaled"]
    assert "was trained with model.args.data_std=its default, here it is 0.5" in error(*first, *scaled)
    none = ["model.args.num_classes=null", f"train.init_from={tmp_path / 'two'}", "-e", tmp_path / "none"]
    assert "was trained with labels, which are left out here" in here(*first, *none)
    some = [f"train.init_from={tmp_path / 'none'}", "-e", tmp_path / "some"]
    assert "was trained without labels; their embeddings start anew" in here(*first, *some)


def test_several_half_lives_and_trackers(here, tmp_path):
    run = tmp_path / "run"
    here(
        "train", *TINY_TRAIN, "-e", run, "ema.half_life_images=[100, 1000]", "train.log_with=[tensorboard]",
        "train.keep_checkpoints=1", "train.keep_snapshots=1",
    )  # fmt: skip
    assert sorted(p.name for p in (run / "snapshots").iterdir()) == [
        "step_00000004.ema_1000.safetensors",
        "step_00000004.safetensors",
    ]
    assert snapshot.load(run).half_life_images == 100
    assert len(checkpoint.list_checkpoints(run / "checkpoints")) == 1
    assert list((run / "tensorboard").glob("events*"))


@pytest.mark.slow
def test_compiled_network_trains_and_its_weights_load(tmp_path):
    """The weights are much closer to those of the plain network than either is to the start."""
    runs = []
    for name, words in {"start": ["optimizer.lr=1e-12"], "plain": [], "compiled": ["train.compile=true"]}.items():
        succeed("train.py", *TINY_TRAIN, "optimizer.warmup_steps=0", "-e", tmp_path / name, *words, timeout=600)
        runs.append(load_file(locate.find(tmp_path / name)))
    start, plain, compiled = runs
    assert compiled.keys() == plain.keys()
    moved, apart = (torch.cat([(plain[k] - other[k]).flatten() for k in plain]).norm() for other in (start, compiled))
    assert apart < 0.05 * moved


@pytest.mark.slow
def test_cifar10_takes_steps_and_the_loss_falls(tmp_path, real_data):
    run = tmp_path / "run"
    succeed(
        "train.py", "-c", "configs/cifar10.yaml", "-e", run, "-mp", "bf16", "train.steps=30", "train.batch_size=16",
        "train.log_every_steps=10", "optimizer.warmup_steps=5", "train.log_with=[]", "train.sample_every_steps=0",
        "preview.n_samples=1", "preview.sampling_steps=1", timeout=900, FLOW_NUM_THREADS="2",
    )  # fmt: skip
    rows = read_metrics(run / "metrics.jsonl")
    assert rows[-1]["loss"] < 0.7 * rows[0]["loss"]


def test_too_few_processes_are_an_error(error, monkeypatch, tmp_path):
    """`accelerate-launch --cpu --num_processes 2` starts one process; these are the marks it leaves."""
    marks = {"ACCELERATE_USE_CPU": "True", "ACCELERATE_MIXED_PRECISION": "no", "MASTER_ADDR": "127.0.0.1"}
    for name, value in marks.items():
        monkeypatch.setenv(name, value)
    assert "--multi_gpu --num_processes N" in error("train", *TINY_TRAIN, "-e", tmp_path / "run")
    assert not (tmp_path / "run").exists()
