"""What training keeps: moving averages, the learning rate, files that are whole or absent, checkpoints, snapshots, metrics."""

import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from configs import schema
from configs.schema import Config, OptimizerConfig, UserError
from flow.runtime import distributed, files
from flow.sampling import snapshot
from flow.training import checkpoint
from flow.training.ema import Ema
from flow.training.logging import Logger, read_metrics
from flow.training.optimizer import lr_at


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


# ---- moving averages


def test_ema_closed_form():
    """From 0 towards 1: after n steps the average is 1 - 0.5^(n B / H), and one half after a half-life of images."""
    net = Net(0.0)
    ema = Ema(net, [1000, 250], warmup_ratio=0)
    net.set(1.0)
    for n in range(1, 11):
        ema.update(100, images=100 * n)
        for i, half_life in enumerate((1000, 250)):
            state = ema.state_dict(i)
            assert state["weight"].tolist() == pytest.approx([1 - 0.5 ** (100 * n / half_life)] * 2, rel=1e-5)
            assert state["scale"].item() == pytest.approx(1 - 0.5 ** (100 * n / half_life), rel=1e-5)
    assert ema.state_dict(0)["weight"][0].item() == pytest.approx(0.5, rel=1e-5)


def test_ema_warm_up_shortens_the_half_life_to_a_share_of_the_images():
    net = Net(0.0)
    ema = Ema(net, [1000], warmup_ratio=0.5)
    net.set(1.0)
    left = 1.0
    for images in range(100, 4001, 100):
        ema.update(100, images)
        left *= 0.5 ** (100 / min(1000, 0.5 * images))
        assert ema.state_dict(0)["weight"][0].item() == pytest.approx(1 - left, rel=1e-4)
    assert left < 0.5**4  # sooner than without warm-up: the start is forgotten


def test_ema_applied_puts_the_weights_back_whatever_happens():
    net = Net(0.0)
    ema = Ema(net, [100, 10_000], warmup_ratio=0)
    net.set(1.0)
    ema.update(100, 100)
    before = {name: value.clone() for name, value in net.state_dict().items()}
    with pytest.raises(RuntimeError, match="inside"), ema.average_parameters() as averaged:
        assert averaged is net and net.weight.requires_grad
        assert net.weight.tolist() == [0.5, 0.5] and net.scale.item() == 0.5
        raise RuntimeError("inside")
    for name, value in net.state_dict().items():
        assert torch.equal(value, before[name]) and value.dtype == before[name].dtype
    with ema.average_parameters(1):
        assert net.weight[0].item() == pytest.approx(1 - 0.5**0.01, rel=1e-4)
    assert ema.state_dict(0)["weight"].tolist() == [0.5, 0.5]  # lending the average leaves it as it was


def test_ema_integer_buffers_are_taken_not_averaged():
    net = Net(0.0)
    ema = Ema(net, [100], warmup_ratio=0)
    net.count.fill_(9)
    ema.update(100, 100)
    state = ema.state_dict(0)
    assert state.keys() == net.state_dict().keys()
    assert state["count"].item() == 9 and state["count"].dtype == torch.int64


# ---- learning rate


@pytest.mark.parametrize(
    ("schedule", "warmup", "values"),  # of updates 0 .. 10 of 10
    [
        ("constant", 0, [1.0] * 11),
        ("constant", 4, [0.25, 0.5, 0.75] + [1.0] * 8),
        ("linear", 0, [1, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1, 0]),
        ("linear", 2, [0.5, 1, 1, 7 / 8, 6 / 8, 5 / 8, 4 / 8, 3 / 8, 2 / 8, 1 / 8, 0]),
        ("cosine", 0, [(1 + np.cos(np.pi * k / 10)) / 2 for k in range(11)]),
        ("cosine", 2, [0.5, 1, *[(1 + np.cos(np.pi * k / 8)) / 2 for k in range(9)]]),
        ("constant", 20, [(k + 1) / 20 for k in range(11)]),  # a warm-up longer than the run
    ],
)
def test_learning_rate(schedule, warmup, values):
    config = OptimizerConfig(lr=3e-4, warmup_steps=warmup, schedule=schedule)
    rates = [lr_at(config, update, 10) for update in range(11)]
    assert rates == pytest.approx([3e-4 * value for value in values], abs=1e-12)


# ---- files


def test_atomic_file_keeps_the_old_content_when_writing_fails(tmp_path):
    path = tmp_path / "new" / "a.txt"
    with files.atomic_file(path) as temporary:
        temporary.write_text("old")
        assert not path.exists() and temporary.parent == path.parent
    with pytest.raises(OSError, match="disk full"), files.atomic_file(path) as temporary:
        temporary.write_text("half of the n")
        raise OSError("disk full")
    assert path.read_text() == "old" and list(path.parent.iterdir()) == [path]
    files.write_text(path, "neu: ü")
    assert path.read_text(encoding="utf-8") == "neu: ü" and list(path.parent.iterdir()) == [path]


# ---- checkpoints


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


# ---- snapshots

SHAPE = (1, 8, 8)


def save_snapshot(path: Path, step: int, half_life: int = 500) -> dict[str, Tensor]:
    config = schema.load(None, ["model.args={width: 16}", "train.batch_size=32", "ema.half_life_images=[500,9000]"])
    weights = {name: value + step for name, value in Net(0.5).state_dict().items()}
    snapshot.save(path, weights, config, SHAPE, step, half_life)
    return weights


def test_a_snapshot_carries_weights_and_configuration(tmp_path):
    path = tmp_path / "new" / "a.safetensors"
    weights = save_snapshot(path, 3)
    assert list(path.parent.iterdir()) == [path]
    loaded = snapshot.load(path)
    assert (loaded.step, loaded.images, loaded.half_life_images, loaded.image_shape) == (3, 96, 500, SHAPE)
    assert loaded.config.model.args == {"width": 16} and loaded.config.train.batch_size == 32
    assert loaded.weights.keys() == weights.keys()
    for name, value in weights.items():
        assert torch.equal(loaded.weights[name], value) and loaded.weights[name].dtype == value.dtype
    net = Net()
    loaded.load_into(net)
    assert net.weight.tolist() == [3.5, 3.5] and net.count.item() == 10


def test_overrides_change_the_configuration_of_a_snapshot_and_a_file_replaces_it(tmp_path):
    save_snapshot(tmp_path / "a.safetensors", 3)
    changed = snapshot.load(tmp_path / "a.safetensors", overrides=["preview.seed=5"]).config
    assert changed.preview.seed == 5 and changed.model.args == {"width": 16}
    (tmp_path / "c.yaml").write_text("model: {args: {width: 24}}")
    replaced = snapshot.load(tmp_path / "a.safetensors", str(tmp_path / "c.yaml")).config
    assert replaced.model.args == {"width": 24} and replaced.train.batch_size == Config().train.batch_size


def test_weights_that_do_not_fit_are_named(tmp_path):
    save_snapshot(tmp_path / "a.safetensors", 3)
    loaded = snapshot.load(tmp_path / "a.safetensors")
    with pytest.raises(UserError, match=r"bias is absent in the file, \(2,\) in model\.name=unet"):
        loaded.load_into(nn.Linear(1, 2))
    loaded.weights["weight"] = torch.zeros(3)
    with pytest.raises(UserError, match=r"weight is \(3,\) in the file, \(2,\)"):
        loaded.load_into(Net())


def test_files_that_are_no_snapshots(tmp_path):
    path = tmp_path / "a.safetensors"
    save_snapshot(path, 3)
    os.truncate(path, path.stat().st_size - 1)
    with pytest.raises(UserError, match=r"a\.safetensors: not a whole safetensors file"):
        snapshot.load(path)
    save_file({"w": torch.zeros(1)}, path)
    with pytest.raises(UserError, match=r"not a snapshot of this project: its header lacks config, "):
        snapshot.load(path)
    with pytest.raises(UserError, match="there is no such file or folder"):
        snapshot.load(tmp_path / "absent")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="holds no snapshot"):
        snapshot.load(tmp_path / "empty")


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


# ---- metrics.jsonl


def test_read_metrics_leaves_out_a_line_that_was_cut_off(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "loss": 0.5}\n{"step": 2, "loss": NaN}\n{"step": 3, "lo')
    first, second = read_metrics(path)
    assert first == {"step": 1, "loss": 0.5} and second["step"] == 2 and np.isnan(second["loss"])
    path.write_text("")
    assert read_metrics(path) == []


TAILS = {"none": "", "cut": '{"step": 3, "lo', "whole": '{"step": 3, "loss": 3.0}\n', "both": '{"step": 3, "loss": 3.0}\n{"st'}


@pytest.mark.parametrize("tail", TAILS.values(), ids=TAILS)
def test_a_resumed_run_goes_on_with_its_metrics(accelerator, tmp_path, tail):
    """Resumed from step 2, whatever was written after it before the crash."""
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 2, "loss": 2.0}\n' + tail)
    tracker = Logger(accelerator, tmp_path, schema.load(None, ["train.log_with=[]"]), first_step=2)
    tracker.log(4, {"loss": 4.0})
    assert read_metrics(path) == [{"step": 2, "loss": 2.0}, {"step": 4, "loss": 4.0}]
