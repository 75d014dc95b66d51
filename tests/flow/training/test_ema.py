"""Moving averages: closed form, warm-up, buffers, weights put back."""

import shutil

import pytest
import torch
from conftest import TINY_RUN, TwoWeights
from safetensors.torch import load_file

from flow.sampling import posthoc_ema, snapshot
from flow.training import checkpoint
from flow.training.ema import Ema


def test_ema_closed_form():
    """From 0 towards 1: after n steps the average is 1 - 0.5^(n B / H), and one half after a half-life of images."""
    net = TwoWeights(0.0)
    ema = Ema(net, [1000, 250], warmup_ratio=0)
    net.set(1.0)
    for n in range(1, 11):
        ema.update(100, images=100 * n)
        for i, half_life in enumerate((1000, 250)):
            state = ema.state_dict(i)
            assert state["weight"].tolist() == pytest.approx([1 - 0.5 ** (100 * n / half_life)] * 2, rel=1e-5)
            assert state["scale"].item() == pytest.approx(1 - 0.5 ** (100 * n / half_life), rel=1e-5)
    assert ema.state_dict(0)["weight"][0].item() == pytest.approx(0.5, rel=1e-5)


def test_ema_warm_up_shortens_half_life():
    """EMA warm up shortens the half life to a share of the images."""
    net = TwoWeights(0.0)
    ema = Ema(net, [1000], warmup_ratio=0.5)
    net.set(1.0)
    left = 1.0
    for images in range(100, 4001, 100):
        ema.update(100, images)
        left *= 0.5 ** (100 / min(1000, 0.5 * images))
        assert ema.state_dict(0)["weight"][0].item() == pytest.approx(1 - left, rel=1e-4)
    assert left < 0.5**4  # sooner than without warm-up: the start is forgotten


def test_ema_applied_restores_weights():
    """EMA applied puts the weights back whatever happens."""
    net = TwoWeights(0.0)
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
    with ema.average_parameters(1) as averaged:
        averaged.eval()
        assert net.weight[0].item() == pytest.approx(1 - 0.5**0.01, rel=1e-4)
    assert net.training
    assert ema.state_dict(0)["weight"].tolist() == [0.5, 0.5]  # lending the average leaves it as it was


def test_ema_integer_buffers_are_taken_not_averaged():
    net = TwoWeights(0.0)
    ema = Ema(net, [100], warmup_ratio=0)
    net.count.fill_(9)
    ema.update(100, 100)
    state = ema.state_dict(0)
    assert state.keys() == net.state_dict().keys()
    assert state["count"].item() == 9 and state["count"].dtype == torch.int64


def test_power_averages_where_a_run_was_stopped(here, tmp_path):
    """A run that is resumed with train.steps equal to its step ends there, and stores the averages of its end."""
    run, stopped, width = tmp_path / "run", tmp_path / "stopped", 0.1
    mlp = [*TINY_RUN, "model.name=mlp", "model.args={width: 16, depth: 1}"]
    here("train", *mlp, "-e", run, f"ema.power_widths=[{width}]")
    shutil.copytree(run, stopped, ignore=shutil.ignore_patterns("step_00000004*"))  # as a signal after step 2 leaves it
    stored = posthoc_ema.stored_path(stopped, width, 2)
    assert not stored.exists()
    here("train", "-e", stopped, "-r", "latest", "train.steps=2")
    carried = load_file(stopped / "checkpoints" / "step_00000002" / checkpoint.power_files([width])[0])
    weights = load_file(stored)
    assert weights.keys() == carried.keys() and all(torch.equal(weights[name], carried[name]) for name in weights)
    power_average = snapshot.load(stored).power_average
    assert (power_average.width, power_average.updates) == (width, 2)
