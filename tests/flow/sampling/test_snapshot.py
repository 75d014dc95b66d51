"""Snapshots: weights, configuration, mistakes, copies beside the checkpoints."""

import os
import shutil
from pathlib import Path

import pytest
import torch
from conftest import TwoWeights
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from configs import loading
from configs.errors import UserError
from configs.schema import Config
from flow.runtime import files
from flow.sampling import locate, snapshot
from flow.training import checkpoint

SHAPE = (1, 8, 8)


def save_snapshot(path: Path, step: int, half_life: int = 500) -> dict[str, Tensor]:
    config = loading.load(None, ["model.args={width: 16}", "train.batch_size=32", "ema.half_life_images=[500,9000]"])
    weights = {name: value + step for name, value in TwoWeights(0.5).state_dict().items()}
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
    net = TwoWeights()
    loaded.load_into(net)
    assert net.weight.tolist() == [3.5, 3.5] and net.count.item() == 10


def test_snapshot_configuration_overrides(tmp_path):
    """Overrides change the configuration of a snapshot and a file replaces it."""
    save_snapshot(tmp_path / "a.safetensors", 3)
    changed = snapshot.load(tmp_path / "a.safetensors", overrides=["flow.label_dropout=0.5"]).config
    assert changed.flow.label_dropout == 0.5 and changed.model.args == {"width": 16}
    (tmp_path / "c.yaml").write_text("model: {args: {width: 24}}")
    replaced = snapshot.load(tmp_path / "a.safetensors", str(tmp_path / "c.yaml")).config
    assert replaced.model.args == {"width": 24} and replaced.train.batch_size == Config().train.batch_size


def test_weights_that_do_not_fit_are_named(tmp_path):
    save_snapshot(tmp_path / "a.safetensors", 3)
    loaded = snapshot.load(tmp_path / "a.safetensors")
    with pytest.raises(UserError, match=r"bias is absent in the file, \(2,\) in the network"):
        loaded.load_into(nn.Linear(1, 2))
    loaded.weights["weight"] = torch.zeros(3)
    with pytest.raises(UserError, match=r"weight is \(3,\) in the file, \(2,\) in the network"):
        loaded.load_into(TwoWeights())


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
    """Two half-lives, three checkpoints, of which two stay of each; then the checkpoints go."""
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

    latest = run / "snapshots" / "step_00000011.safetensors"
    assert locate.find(run) == latest and locate.find(latest) == latest and locate.find(run / "snapshots") == latest
    assert locate.find(saved) == saved / "ema.safetensors"
    shutil.rmtree(run / "checkpoints")
    assert snapshot.load(run).step == 11 and snapshot.load(run).half_life_images == 500
    assert snapshot.load(run / "snapshots" / "step_00000010.ema_9000.safetensors").half_life_images == 9000


def test_snapshots_of_a_run(tmp_path):
    """A run folder means its first half-life, a snapshot in it the own one; other files are left out."""
    folder = tmp_path / "run/snapshots"
    folder.mkdir(parents=True)
    for step in (200, 1000, 30):
        for name in (f"step_{step:08d}.safetensors", f"step_{step:08d}.ema_9000.safetensors", f"step_{step:08d}.grids.json"):
            (folder / name).touch()
    snapshots = locate.snapshots_of_run(tmp_path / "run", ["all"])
    assert [p.name for p in snapshots] == [f"step_{k:08d}.safetensors" for k in (30, 200, 1000)]
    snapshots = locate.snapshots_of_run(folder / "step_00000030.ema_9000.safetensors", ["1000", "200"])
    assert [p.name for p in snapshots] == [f"step_{k:08d}.ema_9000.safetensors" for k in (200, 1000)]
    with pytest.raises(UserError, match="--snapshots 31: must be all, or steps among 30, 200, 1000"):
        locate.snapshots_of_run(tmp_path / "run", ["30", "31"])
    with pytest.raises(UserError, match="neither a run folder with snapshots nor one of its snapshots"):
        locate.snapshots_of_run(folder, ["all"])


def test_results_lie_in_the_run_folder(tmp_path, monkeypatch):
    """Those of a checkpoint, too, which the training may delete."""
    monkeypatch.chdir(tmp_path)
    run = Path("runs/first")
    checkpoint = run / "checkpoints/step_00000003"
    for file in (run / "snapshots/step_00000003.safetensors", checkpoint / locate.EMA_FILE, Path("other/ema.safetensors")):
        file.parent.mkdir(parents=True)
        file.touch()
    (run / "config.yaml").touch()
    for weights in (run, run / "snapshots/step_00000003.safetensors", checkpoint, checkpoint / locate.EMA_FILE):
        assert locate.results_folder(weights) == run
    assert locate.results_folder("other") == locate.results_folder("other/ema.safetensors") == Path("other")


def test_publishing_without_hard_links_copies(tmp_path, monkeypatch):
    def no_links(*args):
        raise OSError("not supported")

    monkeypatch.setattr(os, "link", no_links)
    save_snapshot(tmp_path / "c" / "ema.safetensors", 4)
    checkpoint.link_ema_snapshots(tmp_path / "c", tmp_path / "snapshots", 4, [500], keep=0)
    assert load_file(locate.find(tmp_path / "snapshots"))["weight"].tolist() == [4.5, 4.5]


def test_the_hash_is_that_of_the_file_that_was_read(tmp_path):
    """Another snapshot may take the name of best.safetensors while a command works with the old one."""
    path = tmp_path / "best.safetensors"
    save_snapshot(path, 3)
    hashed_before, hashed_after = snapshot.load(path), snapshot.load(path)
    assert hashed_before.sha256 == files.sha256(path)
    save_snapshot(path, 4)
    assert hashed_before.sha256 != files.sha256(path)
    with pytest.raises(UserError, match=r"best\.safetensors: was replaced while it was in use"):
        hashed_after.sha256  # noqa: B018


def test_pinned_weights_stay_those_that_were_read(tmp_path):
    """Though the run has a later snapshot by then; what the hub holds has a name of its own."""
    run = tmp_path / "run"
    save_snapshot(run / "snapshots/step_00000003.safetensors", 3)
    snap = snapshot.load(run)
    save_snapshot(run / "snapshots/step_00000004.safetensors", 4)
    assert snapshot.load(run).step == 4
    pinned = locate.pinned(str(run), snap.path)
    assert pinned == str(run / "snapshots/step_00000003.safetensors") and snapshot.load(pinned).sha256 == snap.sha256
    assert locate.pinned("hf:owner/name@main", snap.path) == "hf:owner/name@main"
