"""Checkpoints: damage is named, the newest whole one is found, old ones are removed."""

import os
import shutil
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import save_file
from torch import nn

from configs.errors import UserError
from flow.runtime import distributed, step_names
from flow.sampling import locate
from flow.training import checkpoint


@pytest.fixture
def accelerator() -> Accelerator:
    accelerator, net = distributed.build_accelerator(), nn.Linear(2, 2)
    accelerator.prepare(net, torch.optim.AdamW(net.parameters()))  # what its checkpoints hold
    return accelerator


def save_checkpoint(accelerator: Accelerator, folder: Path, step: int) -> Path:
    """A checkpoint as train.py writes it, with an average of one tensor."""
    average = {"weight": torch.full((2,), float(step))}
    write_average = lambda path: save_file(average, path / locate.EMA_FILE)  # noqa: E731
    return checkpoint.save(accelerator, folder, step, {"updates": step}, write_average)


def flip_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


DAMAGES = {
    "missing": (lambda p: (p / "ema.safetensors").unlink(), "ema.safetensors is missing"),
    "truncated": (lambda p: os.truncate(p / "ema.safetensors", 5), "ema.safetensors has 5 bytes instead of"),
    "flipped": (lambda p: flip_byte(p / "ema.safetensors"), "ema.safetensors has changed since it was written"),
    "state": (lambda p: flip_byte(p / "state.json"), "state.json has changed"),
    "no_manifest": (lambda p: (p / "manifest.json").unlink(), "manifest.json cannot be read"),
    "half_manifest": (lambda p: os.truncate(p / "manifest.json", 20), "manifest.json cannot be read"),
    "binary_manifest": (lambda p: (p / "manifest.json").write_bytes(b"\xff\xfe\x00"), "manifest.json cannot be read"),
    "list_manifest": (lambda p: (p / "manifest.json").write_text("[]"), "manifest.json cannot be read"),
    "empty_manifest": (lambda p: (p / "manifest.json").write_text("{}"), "manifest.json names no file model"),
    "odd_manifest": (lambda p: (p / "manifest.json").write_text('{"state.json": 3}'), "manifest.json cannot be read"),
    "odd_entry": (lambda p: (p / "manifest.json").write_text('{"state.json": {}}'), "manifest.json cannot be read"),
}


@pytest.mark.parametrize("kind", DAMAGES)
def test_damage_of_a_checkpoint_is_named(accelerator, tmp_path, kind):
    path = save_checkpoint(accelerator, tmp_path, 2)
    assert path == tmp_path / "step_00000002" and checkpoint.verify(path) is None
    damage, message = DAMAGES[kind]
    damage(path)
    assert message in checkpoint.verify(path)


def test_the_newest_whole_checkpoint_is_found(accelerator, tmp_path, capsys):
    paths = [save_checkpoint(accelerator, tmp_path, step) for step in (2, 10, 100)]
    assert checkpoint.find_latest(tmp_path) == paths[2]
    os.truncate(paths[2] / "state.json", 1)
    assert checkpoint.find_latest(tmp_path) == paths[1]
    warning = capsys.readouterr().out
    assert "step_00000100 is damaged and skipped: state.json has 1 bytes" in warning
    for path in paths[:2]:
        (path / "state.json").unlink()
    with pytest.raises(UserError, match=r"all checkpoints in .* are damaged"):
        checkpoint.find_latest(tmp_path)


def test_prune_keeps_the_newest(accelerator, tmp_path):
    for step in (5, 20, 100, 99_999_999, 100_000_000):
        save_checkpoint(accelerator, tmp_path, step)
    (tmp_path / "step_notes").mkdir()  # the user's own
    checkpoint.prune(tmp_path, 0)
    assert [step_names.step_of(p) for p in checkpoint.list_checkpoints(tmp_path)] == [5, 20, 100, 99_999_999, 100_000_000]
    checkpoint.prune(tmp_path, 2)
    assert [step_names.step_of(p) for p in checkpoint.list_checkpoints(tmp_path)] == [99_999_999, 100_000_000]
    checkpoint.prune(tmp_path, 3)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step_100000000", "step_99999999", "step_notes"]


def test_kill_before_pruning(here, tiny_run, tmp_path):
    """A kill after the last checkpoint leaves one too many; the finished run that is resumed deletes it."""
    run = tmp_path / "run"
    shutil.copytree(tiny_run, run)
    assert len(checkpoint.list_checkpoints(run / "checkpoints")) == 2
    here("train", "-e", run, "-r", "latest", "train.keep_checkpoints=1")
    (left,) = checkpoint.list_checkpoints(run / "checkpoints")
    assert left.name == "step_00000004" and checkpoint.verify(left) is None


def test_run_without_checkpoints_does_not_start_anew(error, tiny_run, tmp_path):
    """Its snapshots outlive checkpoints that were deleted to save space, and a training from step 0 would replace them."""
    run = tmp_path / "run"
    shutil.copytree(tiny_run, run, ignore=shutil.ignore_patterns("checkpoints"))
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    for resume in ("latest", run):
        line = error("train", "-e", run, "-r", resume, "train.steps=6")
        assert f"-r {resume}: {run} has snapshots and no checkpoint" in line and "train.init_from" in line
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before
    assert {"metrics.jsonl", "step_00000002.safetensors", "step_00000004.safetensors"} <= {path.name for path in before}


def test_failed_checkpoint_leaves_earlier_ones(accelerator, tmp_path):
    """A checkpoint that cannot be written leaves the earlier ones."""
    first = save_checkpoint(accelerator, tmp_path, 1)

    def write_more(path: Path) -> None:
        raise OSError(28, "No space left on device")

    with pytest.raises(UserError, match=r"step_00000002 was not written: .*No space left.*latest checkpoint is .*00000001"):
        checkpoint.save(accelerator, tmp_path, 2, {}, write_more)
    assert list(tmp_path.iterdir()) == [first] and checkpoint.verify(first) is None
    (tmp_path / ".tmp-step_00000003").mkdir()  # a run was killed while it wrote
    assert checkpoint.find_latest(tmp_path) == first
    save_checkpoint(accelerator, tmp_path, 3)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step_00000001", "step_00000003"]


def test_checkpoint_restores_everything(tmp_path):
    """A checkpoint restores network, optimizer and state."""
    own = distributed.build_accelerator()
    net = nn.Linear(2, 2)
    net, optimizer = own.prepare(net, torch.optim.AdamW(net.parameters(), lr=0.1))
    net(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    path = checkpoint.save(own, tmp_path, 7, {"updates": 6, "meter": [1.5]}, lambda folder: None)
    assert not list(path.glob("random_states*"))  # nothing random is carried in a state
    saved = {name: value.clone() for name, value in net.state_dict().items()}
    moment = optimizer.state[net.weight]["exp_avg"].clone()
    optimizer.step()
    assert not torch.equal(net.weight, saved["weight"])
    assert checkpoint.load(own, path) == {"step": 7, "updates": 6, "meter": [1.5]}
    assert all(torch.equal(value, saved[name]) for name, value in net.state_dict().items())
    assert torch.equal(optimizer.state[net.weight]["exp_avg"], moment)
