"""Checkpoints: whole or absent, damage that is named, the latest one, snapshots that outlive them."""

import os
import shutil
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from configs import schema
from configs.schema import UserError
from flow.runtime import distributed
from flow.sampling import snapshot
from flow.training import checkpoint


class Net(nn.Module):
    """Two weights, a float64 buffer and an integer one."""

    def __init__(self, value: float = 0.0):
        super().__init__()
        self.weight = nn.Parameter(torch.full((2,), value))
        self.register_buffer("scale", torch.full((1,), value, dtype=torch.float64))
        self.register_buffer("count", torch.tensor([7]))

    def set(self, value: float) -> None:
        with torch.no_grad():
            self.weight.fill_(value)
            self.scale.fill_(value)


@pytest.fixture
def accelerator() -> Accelerator:
    accelerator, net = distributed.build_accelerator(), nn.Linear(2, 2)
    accelerator.prepare(net, torch.optim.AdamW(net.parameters()))  # what its checkpoints hold
    return accelerator


def save_checkpoint(accelerator: Accelerator, folder: Path, step: int) -> Path:
    """A checkpoint as train.py writes it, with an average of one tensor."""
    average = {"weight": torch.full((2,), float(step))}
    write_average = lambda path: save_file(average, path / snapshot.EMA_FILE)  # noqa: E731
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
    assert checkpoint.find_latest(accelerator, tmp_path) == paths[2]
    os.truncate(paths[2] / "state.json", 1)
    assert checkpoint.find_latest(accelerator, tmp_path) == paths[1]
    warning = capsys.readouterr().out
    assert "step_00000100 is damaged and skipped: state.json has 1 bytes" in warning
    for path in paths[:2]:
        (path / "state.json").unlink()
    with pytest.raises(UserError, match=r"all checkpoints in .* are damaged"):
        checkpoint.find_latest(accelerator, tmp_path)
    assert save_checkpoint(accelerator, tmp_path, 100) == paths[2]  # a damaged one is replaced
    assert checkpoint.find_latest(accelerator, tmp_path) == paths[2]


def test_prune_keeps_the_newest(accelerator, tmp_path):
    for step in (5, 20, 100, 99_999_999, 100_000_000):
        save_checkpoint(accelerator, tmp_path, step)
    (tmp_path / "step_notes").mkdir()  # the user's own
    checkpoint.prune(tmp_path, 0)
    assert [checkpoint.parse_step(p) for p in checkpoint.list_checkpoints(tmp_path)] == [5, 20, 100, 99_999_999, 100_000_000]
    checkpoint.prune(tmp_path, 2)
    assert [checkpoint.parse_step(p) for p in checkpoint.list_checkpoints(tmp_path)] == [99_999_999, 100_000_000]
    checkpoint.prune(tmp_path, 3)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step_100000000", "step_99999999", "step_notes"]


def test_a_checkpoint_that_cannot_be_written_leaves_the_earlier_ones(accelerator, tmp_path):
    first = save_checkpoint(accelerator, tmp_path, 1)

    def write_more(path: Path) -> None:
        raise OSError(28, "No space left on device")

    with pytest.raises(UserError, match=r"step_00000002 was not written: .*No space left.*latest checkpoint is .*00000001"):
        checkpoint.save(accelerator, tmp_path, 2, {}, write_more)
    assert list(tmp_path.iterdir()) == [first] and checkpoint.verify(first) is None
    (tmp_path / ".tmp-step_00000003").mkdir()  # a run was killed while it wrote
    assert checkpoint.find_latest(accelerator, tmp_path) == first
    save_checkpoint(accelerator, tmp_path, 3)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step_00000001", "step_00000003"]


def test_a_checkpoint_restores_network_optimizer_and_state(tmp_path):
    own = distributed.build_accelerator()
    net = nn.Linear(2, 2)
    net, optimizer = own.prepare(net, torch.optim.AdamW(net.parameters(), lr=0.1))
    net(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    path = checkpoint.save(own, tmp_path, 7, {"updates": 6, "meter": [1.5]}, lambda folder: None)
    assert not list(path.glob("random_states*"))  # nothing random is carried in a state
    kept = {name: value.clone() for name, value in net.state_dict().items()}
    moment = optimizer.state[net.weight]["exp_avg"].clone()
    optimizer.step()
    assert not torch.equal(net.weight, kept["weight"])
    assert checkpoint.load(own, path) == {"step": 7, "updates": 6, "meter": [1.5]}
    assert all(torch.equal(value, kept[name]) for name, value in net.state_dict().items())
    assert torch.equal(optimizer.state[net.weight]["exp_avg"], moment)


SHAPE = (1, 8, 8)


def save_snapshot(path: Path, step: int, half_life: int = 500) -> dict[str, Tensor]:
    config = schema.load(None, ["model.args={width: 16}", "train.batch_size=32", "ema.half_life_images=[500,9000]"])
    weights = {name: value + step for name, value in Net(0.5).state_dict().items()}
    snapshot.save(path, weights, config, SHAPE, step, half_life)
    return weights


def test_published_snapshots_outlive_their_checkpoints(tmp_path):
    """Two half-lives, three checkpoints, two kept of each; then the checkpoints go."""
    run, half_lives = tmp_path / "run", [500, 9000]
    assert checkpoint.ema_files(half_lives) == ["ema.safetensors", "ema_9000.safetensors"]
    for step in (9, 10, 11):
        saved = run / "checkpoints" / f"step_{step:08d}"
        for name, half_life in zip(checkpoint.ema_files(half_lives), half_lives, strict=True):
            save_snapshot(saved / name, step, half_life)
        for _ in range(2):  # a resumed run publishes its last step again
            checkpoint.link_ema_snapshots(saved, run / "snapshots", step, half_lives, keep=2)
    names = ("step_00000010", "step_00000010.ema_9000", "step_00000011", "step_00000011.ema_9000")
    assert {p.name for p in (run / "snapshots").iterdir()} == {f"{name}.safetensors" for name in names}

    newest = run / "snapshots" / "step_00000011.safetensors"
    assert snapshot.find(run) == newest and snapshot.find(newest) == newest and snapshot.find(run / "snapshots") == newest
    assert snapshot.find(saved) == saved / "ema.safetensors"
    shutil.rmtree(run / "checkpoints")
    assert snapshot.load(run).step == 11 and snapshot.load(run).half_life_images == 500
    assert snapshot.load(run / "snapshots" / "step_00000010.ema_9000.safetensors").half_life_images == 9000


def test_publishing_without_hard_links_copies(tmp_path, monkeypatch):
    def no_links(*args):
        raise OSError("not supported")

    monkeypatch.setattr(os, "link", no_links)
    save_snapshot(tmp_path / "c" / "ema.safetensors", 4)
    checkpoint.link_ema_snapshots(tmp_path / "c", tmp_path / "snapshots", 4, [500], keep=0)
    assert load_file(snapshot.find(tmp_path / "snapshots"))["weight"].tolist() == [4.5, 4.5]
