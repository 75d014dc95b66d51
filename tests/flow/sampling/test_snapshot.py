"""Snapshots: weights with their configuration, overrides, files that are none."""

import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from configs import schema
from configs.schema import Config, UserError
from flow.sampling import snapshot


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
