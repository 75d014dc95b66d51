"""Reflow and distillation: distances, objectives, straightness deviation, inversion."""

import math

import pytest
import torch
from conftest import loss_at

from flow import losses, path, solvers, time_samplers
from flow.evaluation.straightness import straightness_deviation
from flow.guidance import GuidedVelocity
from flow.likelihood import T_MAX, invert
from flow.losses import distances
from flow.model import FlowModel
from flow.path import LinearPath
from flow.solvers import time_grids


def build(name: str, prediction: str = "velocity", **args) -> losses.FlowLoss:
    return losses.build(name, LinearPath(), prediction, time_samplers.build("uniform"), args)


def test_distances():
    a, b = torch.tensor([[3.0, 4.0], [0.0, 0.0]]), torch.zeros(2, 2)
    assert distances.mse(a, b).tolist() == [12.5, 0] and distances.l1(a, b).tolist() == [3.5, 0]
    far, near = distances.pseudo_huber(a, b, c=1e-3)
    assert far.item() == pytest.approx(math.sqrt(12.5), abs=2e-3) and near == 0
    small = distances.pseudo_huber(a * 1e-3, b, c=1.0)[0].item()
    assert small == pytest.approx(12.5e-6 / 2, rel=1e-2)  # mse / (2 c) far below c
    a = torch.zeros(1, 2, requires_grad=True)
    distances.build("pseudo_huber", {"c": 0.03})(a, torch.zeros(1, 2)).sum().backward()
    assert a.grad.isfinite().all()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: distances.build("huber", {}), "unknown distance 'huber'; choose from mse, l1, pseudo_huber"),
        (lambda: distances.build("pseudo_huber", {"d": 1}), "pseudo_huber has no argument 'd'; it takes c"),
        (lambda: distances.build("pseudo_huber", {"c": 0}), "c=0: must be greater than 0"),
        (lambda: distances.build("mse", {"c": 1}), "mse has no argument 'c'; it takes none"),
        (lambda: time_samplers.build("u_shaped", a=-1), "a=-1: must be greater than 0"),
        (lambda: distances.build("pseudo_huber", {"name": 3}), "pseudo_huber has no argument 'name'; it takes c"),
        (lambda: build("flow_matching", "x1"), "unknown prediction 'x1'; choose from velocity, data, noise"),
        (
            lambda: losses.build("distillation", LinearPath(), "velocity", lambda u: u, {"steps": "two"}),
            "steps='two': must be a finite number",
        ),
        (
            lambda: losses.build("distil", LinearPath(), "velocity", lambda u: u, {}),
            "unknown loss 'distil'; choose from alpha_flow, flow_matching, distillation",
        ),
        (
            lambda: build("distillation", steps=0),
            "steps=0: must be a whole number of at least 1",
        ),
        (lambda: build("distillation", steps=1.5), "steps=1.5: must be a whole number"),
        (lambda: build("distillation", flow_share=1), "flow_share=1: must be 0 or more"),
        (lambda: build("distillation", weight_power=-1), "weight_power=-1: must be 0 or more"),
    ],
)
def test_errors_name_the_value_and_what_would_be_right(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(("steps", "expected"), [(1, [0, 0, 0, 0]), (2, [0, 0, 0.5, 0.5]), (4, [0, 0.25, 0.5, 0.75])])
def test_distillation_times_are_euler_steps(steps, expected):
    """Distillation trains at the times of Euler steps."""
    seen = []

    def net(x, t, y):
        seen.append((x, t))
        return torch.zeros_like(x)

    x0, x1, t = torch.randn(4, 3), torch.randn(4, 3), torch.tensor([0.1, 0.3, 0.6, 1.0])
    result = loss_at(build("distillation", steps=steps), net, x0, x1, t)
    ((x, at),) = seen
    assert at.tolist() == expected == result.t.tolist()
    assert torch.allclose(x, LinearPath().interpolate(x0, x1, torch.tensor(expected)))
    assert torch.allclose(result.per_sample, (x1 - x0).square().mean(1))


@pytest.mark.parametrize("time_sampler", ["uniform", "u_shaped"])
def test_a_share_of_distillation_stays_flow_matching(time_sampler):
    sampler = time_samplers.build(time_sampler)
    loss = losses.build("distillation", LinearPath(), "velocity", sampler, {"steps": 2, "flow_share": 0.4})
    t = loss.times((torch.arange(1000, dtype=torch.float64) + 0.5) / 1000)
    between = t[:400]
    assert torch.allclose(between, sampler((torch.arange(400, dtype=torch.float64) + 0.5) / 400).float())
    assert t[400:700].unique().tolist() == [0.0] and t[700:].unique().tolist() == [0.5]


@pytest.mark.parametrize("name", path.PATHS)
@pytest.mark.parametrize(
    ("loss_name", "prediction"),
    [*(("flow_matching", p) for p in path.PREDICTIONS), *(("distillation", p) for p in path.PREDICTIONS if p != "noise")],
)
def test_targets_are_bounded_up_to_the_data_end(name, loss_name, prediction):
    """The velocity of VP has a pole at t = 1: -650 x0 at the largest float32 below, infinite there."""
    p, below_one = path.build(name), torch.tensor(1.0).nextafter(torch.tensor(0.0)).item()
    t = torch.tensor([0.0, 0.5, 0.999, 1 - 1e-6, below_one, 1.0])
    asked = []

    def net(x, t, y):
        asked.append(t)
        return x * 0

    args = {"flow_share": 0.9} if loss_name == "distillation" else {}
    loss = losses.build(loss_name, p, prediction, time_samplers.build("uniform"), args)
    assert loss_at(loss, net, torch.ones(6, 2), torch.zeros(6, 2), t).per_sample.max() < 51**2
    assert asked[0].max() <= torch.tensor(p.t_max)
    assert p.target(torch.ones(6, 2), torch.zeros(6, 2), p.clip(t), prediction).abs().max() < 51


@pytest.mark.parametrize("name", path.PATHS)
@pytest.mark.parametrize("method", ["dopri5", "heun3"])
def test_sampling_asks_no_later_than_training(name, method):
    asked = []

    def net(x, t, y):
        asked.append(t.max().item())
        return -x

    velocity = GuidedVelocity(FlowModel(net, path.build(name), (1, 8, 8)))
    times = [0.0, 0.5, 1 - 1e-7, 1.0] if method == "heun3" else [0.0, 1.0]
    assert solvers.solve(velocity, torch.ones(1, 2, dtype=torch.float64), times, method).x.isfinite().all()
    assert 0.99 < max(asked) <= torch.tensor(path.build(name).t_max).item()


@pytest.mark.parametrize("name", path.PATHS)
def test_distillation_of_noise_prediction_is_refused(name, error, tmp_path):
    """Its loss is 0 for the identity; of the others the target at t = 0 depends on the data."""
    given = ["loss.name=distillation", "flow.prediction=noise", f"flow.path={name}", "train.steps=1"]
    message = error("train", "-c", "configs/digits.yaml", "-e", tmp_path / "run", *given)
    assert not (tmp_path / "run").exists()
    assert "flow.prediction=noise has nothing to learn at t = 0" in message and "use velocity or data" in message
    x0, t = torch.ones(1, 2), torch.zeros(1)
    for prediction in ("velocity", "data"):
        a, b = (path.build(name).target(x0, x1, t, prediction) for x1 in (x0, -x0))
        assert (a - b).abs().min() > 0.1


def test_straightness_deviation():
    """0 for a velocity that does not change along the way; for v = 2 t the integral of (1 - 2 t)^2 is 1 / 3."""
    x0 = torch.randn(5, 2, 3, dtype=torch.float64)
    assert straightness_deviation(lambda x, t, t_next: torch.ones_like(x), x0, 20).abs().max() < 1e-12
    curved = straightness_deviation(lambda x, t, t_next: torch.full_like(x, 2 * t), x0, 1000)
    assert torch.allclose(curved, torch.full((5,), 1 / 3, dtype=torch.float64), atol=1e-3)


def test_inversion_finds_the_noise_back():
    """Data N(3, 0.5^2): the exact velocity of the linear path, whose flow is x0 -> 3 + 0.5 x0."""

    def velocity(x, t, t_next=None):
        variance = (1 - t) ** 2 + (0.5 * t) ** 2
        return 3 + (0.25 * t - (1 - t)) / variance * (x - 3 * t)

    x0 = torch.randn(2000, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    x1 = solvers.solve(velocity, x0, time_grids.uniform(100), "heun").x
    assert torch.allclose(x1, 3 + 0.5 * x0, atol=1e-3)
    noise = torch.randn(2000, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    found = invert(velocity, x1, noise, 100, "heun")
    assert torch.allclose(found, x0, atol=4 * (1 - T_MAX) / 0.5 + 0.05)
    assert found.std().item() == pytest.approx(1, abs=0.02)
