"""Preconditioning: unit sizes inside the network, exact velocities of Gaussian data around a network that says nothing."""

import pytest
import torch
from conftest import TINY_TRAIN, run_here
from torch import nn

import models
from flow.model import FlowModel
from flow.path import CosinePath, LinearPath
from flow.solvers import solve
from models.preconditioning import Preconditioned


class Recorder(nn.Module):
    """Returns `output`, and keeps its input."""

    output = 0.0

    def forward(self, x, t, y=None, t_next=None):
        self.x = x
        return torch.full_like(x, self.output)


@pytest.mark.parametrize("data_std", [0.3, 1.0, 2.0])
def test_input_and_target_have_unit_variance(data_std):
    torch.manual_seed(0)
    net = Recorder()
    outer = Preconditioned(net, data_std)
    x0, x1 = torch.randn(200_000, 1, 1, 1), data_std * torch.randn(200_000, 1, 1, 1)
    for time in (0.0, 0.25, 0.9, 1.0):
        t = torch.full((len(x0),), time)
        x_t = LinearPath().interpolate(x0, x1, t)
        net.output = 0.0
        zero = outer(x_t, t)
        net.output = 1.0
        c_out = (outer(x_t, t) - zero).mean()
        target = (x1 - x0 - zero) / c_out  # what the network learns
        assert net.x.std().item() == pytest.approx(1, abs=0.01)
        assert target.std().item() == pytest.approx(1, abs=0.01)
        assert (target * net.x).mean().abs() < 0.01  # nothing linear is left to learn


def test_silent_network_carries_noise_to_gaussian_data():
    outer = Preconditioned(Recorder(), 0.5)
    x0 = torch.randn(1000, 1, 1, 1, dtype=torch.float64)
    grid = [k / 50 for k in range(51)]
    solution = solve(lambda x, t, t_next=None: outer(x, torch.full((len(x),), t, dtype=x.dtype)), x0, grid, "rk4")
    assert torch.allclose(solution.x, 0.5 * x0, atol=1e-4)


def test_wrong_values_are_named():
    with pytest.raises(ValueError, match=r"data_std=0: must be a finite number above 0"):
        models.build("mini_unet", (1, 8, 8), {"data_std": 0})
    with pytest.raises(ValueError, match=r"data_std=True: must be a finite number above 0"):
        models.build("mini_unet", (1, 8, 8), {"data_std": True})
    net = models.build("mini_unet", (1, 8, 8), {"data_std": 0.5})
    with pytest.raises(ValueError, match=r"data_std=0.5: preconditioning needs flow.path=linear"):
        FlowModel(net, CosinePath(), (1, 8, 8))


def test_trains_and_samples(tmp_path):
    run_here("train", *TINY_TRAIN, "model.args.data_std=0.5", "-e", tmp_path / "run")
    flow_map = ["model.args.two_times=true", "loss.name=alpha_flow", f"train.init_from={tmp_path / 'run'}"]
    run_here("train", *TINY_TRAIN, "model.args.data_std=0.5", *flow_map, "-e", tmp_path / "map")
    run_here(
        "sample", "--weights", tmp_path / "map", "--n_samples", "2", "--sampling_steps", "2", "--save_dir", tmp_path / "samples"
    )
    assert len(list((tmp_path / "samples").glob("images/*.png"))) == 2
