"""Networks with two times: where they come from, which paths they live on, their steps, half precision."""

from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from conftest import TINY_TRAIN
from safetensors.torch import load_file
from small_networks import SMALL, build, inputs

import models
from flow import losses, path, solvers, time_samplers
from flow.model import FlowModel
from flow.sampling import locate
from flow.solvers.time_grids import uniform
from flow.training.eager import EagerNetwork


@pytest.mark.parametrize("name", SMALL)
def test_second_time_changes_nothing_at_the_start(name):
    """Its embedding is zero; with t_next=None it still gets a gradient, which DDP waits for."""
    one, two = (models.build(name, (1, 8, 8), {**SMALL[name], "num_classes": 3, "two_times": flag}) for flag in (False, True))
    missing, unexpected = two.load_state_dict(one.state_dict(), strict=False)
    assert not unexpected and missing and all(key.startswith("conditioning.step_embedding.") for key in missing)
    x, t, y = inputs()
    assert torch.equal(one(x, t, y), two(x, t, y)) and torch.equal(one(x, t, y), two(x, t, y, t + 0.3))
    for p in two.parameters():
        torch.nn.init.normal_(p, std=0.1)
    two(x, t, y).square().sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in two.conditioning.step_embedding.parameters())
    assert not torch.allclose(two(x, t, y), two(x, t, y, t + 0.3))
    assert torch.allclose(two(x, t, y), two(x, t, y, t))


@pytest.mark.parametrize("method", solvers.DETERMINISTIC)
@pytest.mark.parametrize("backwards", [False, True])
def test_only_whole_steps_pass_their_end(method, backwards):
    calls = []

    def velocity(x, t, t_next):
        calls.append((t, t_next))
        return -x

    grid = [0.9 * t for t in (reversed(uniform(4)) if backwards else uniform(4))]
    solvers.solve(velocity, torch.ones(2, 3, dtype=torch.float64), grid, method)
    if method in ("euler", "ddim") and not backwards:
        assert calls == list(pairwise(grid))
    else:
        assert all(t == t_next for t, t_next in calls)


def test_flow_maps_live_on_the_linear_path():
    net = build("mlp", two_times=True)
    FlowModel(net, path.LinearPath(), (1, 8, 8))
    for model in ({"path": path.VPPath()}, {"path": path.LinearPath(), "prediction": "data"}):
        with pytest.raises(ValueError, match=r"two_times=true: a flow map needs flow.path=linear"):
            FlowModel(net, shape=(1, 8, 8), **model)


def test_flow_weights_start_a_flow_map(here, tmp_path, tiny_run):
    """The embedding of the second time is the only part that the weights of a flow lack."""
    flow_map = ["model.args.two_times=true", "loss.name=alpha_flow", f"train.init_from={tiny_run}"]
    here("train", *TINY_TRAIN, *flow_map, "train.steps=1", "optimizer.lr=1e-12", "-e", tmp_path / "run")
    before, after = (load_file(locate.find(run)) for run in (tiny_run, tmp_path / "run"))
    layer = "conditioning.step_embedding.linear"
    assert {key for key in after if key not in before} == {f"{layer}.weight", f"{layer}.bias"}
    assert all(torch.allclose(after[key], before[key], atol=1e-6) for key in before)


def test_alpha_flow_in_bf16():
    """Its gradient is that of float32, though alpha divides the difference of two passes by 200."""
    g, n = torch.Generator().manual_seed(0), 256
    x0, x1 = torch.randn(2, n, 1, 8, 8, generator=g)
    u, y = torch.rand(n, 3, generator=g, dtype=torch.float64), torch.arange(n) % 4
    batch = losses.Batch(x1, x0, y, u, 0, slice(0, n), range(n), list(range(n)), progress=1.0)
    loss = losses.build("alpha_flow", path.LinearPath(), "velocity", time_samplers.build("uniform"), {"map_share": 1.0})
    gradients = []
    for prepare in (lambda net: net, Accelerator(cpu=True, mixed_precision="bf16").prepare):
        net = build("mini_unet", two_times=True, time_frequency=6.0)
        loss(prepare(net), EagerNetwork(net), batch).per_sample.mean().backward()
        gradients.append(torch.cat([p.grad.flatten() for p in net.parameters()]))
    assert F.cosine_similarity(*gradients, dim=0) > 0.97
