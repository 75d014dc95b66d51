"""Paths and predictions: ends, velocities, conversions, the same flow for each."""

import pytest
import torch

from flow import path, solvers
from flow.guidance import GuidedVelocity
from flow.model import FlowModel
from flow.path import LinearPath

PATH = LinearPath()


@pytest.mark.parametrize("shape", [(5,), (5, 2), (5, 3, 4, 4)])
def test_ends_of_the_path_for_every_shape(shape):
    x0, x1 = torch.randn(shape), torch.randn(shape)
    assert torch.equal(PATH.interpolate(x0, x1, torch.zeros(5)), x0)
    assert torch.equal(PATH.interpolate(x0, x1, torch.ones(5)), x1)


def test_each_sample_has_its_own_time():
    x0, x1 = torch.zeros(3, 1, 2, 2), torch.ones(3, 1, 2, 2)
    xt = PATH.interpolate(x0, x1, torch.tensor([0.0, 0.25, 1.0]))
    assert xt.mean((1, 2, 3)).tolist() == [0.0, 0.25, 1.0]


@pytest.mark.parametrize("name", path.PATHS)
@pytest.mark.parametrize("t", [0.0, 0.3, 0.9])
def test_the_velocity_is_the_derivative_of_the_path(name, t):
    x0, x1 = torch.randn(2, 4, 3, dtype=torch.float64)
    h, p = 1e-6, path.build(name)
    later, now = (torch.full((4,), time, dtype=torch.float64) for time in (t + h, t))
    difference = (p.interpolate(x0, x1, later) - p.interpolate(x0, x1, now)) / h
    assert torch.allclose(difference, p.velocity(x0, x1, now), atol=1e-4)


@pytest.mark.parametrize("name", path.PATHS)
def test_every_path_maps_to_the_linear_one(name):
    p = path.build(name)
    x0, x1 = torch.randn(2, 4, 3, dtype=torch.float64)
    assert torch.allclose(p.interpolate(x0, x1, torch.zeros(4, dtype=torch.float64)), x0, atol=0.03)  # VP: alpha = 0.0066
    assert torch.allclose(p.interpolate(x0, x1, torch.ones(4, dtype=torch.float64)), x1, atol=1e-12)
    for t in (0.01, 0.3, 0.77, 0.99):
        assert p.t_from_linear(p.t_to_linear(t)) == pytest.approx(t, abs=1e-12)
        alpha, sigma, *_ = p.coefficients(torch.tensor([t], dtype=torch.float64))
        on_linear_path = p.interpolate(x0, x1, torch.full((4,), t, dtype=torch.float64)) / (alpha + sigma)
        r = torch.full((4,), p.t_to_linear(t), dtype=torch.float64)
        assert torch.allclose(on_linear_path, path.LinearPath().interpolate(x0, x1, r))


@pytest.mark.parametrize("name", path.PATHS)
@pytest.mark.parametrize("given", [*path.PREDICTIONS, "score"])
@pytest.mark.parametrize("wanted", [*path.PREDICTIONS, "score"])
def test_conversions_agree_with_the_pair_and_come_back(name, given, wanted):
    p = path.build(name)
    x0, x1 = torch.randn(2, 5, 3, dtype=torch.float64)
    t = torch.tensor([0.1, 0.3, 0.5, 0.8, 0.95], dtype=torch.float64)
    x = p.interpolate(x0, x1, t)
    known = {kind: p.target(x0, x1, t, kind) for kind in path.PREDICTIONS}
    known["score"] = -x0 / p.coefficients(t)[1][:, None]
    converted = p.convert(x, t, known[given], given, wanted)
    assert torch.allclose(converted, known[wanted], rtol=1e-9, atol=1e-9)
    assert torch.allclose(p.convert(x, t, converted, wanted, given), known[given], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", path.PATHS)
@pytest.mark.parametrize("prediction", path.PREDICTIONS)
def test_every_path_and_prediction_is_one_flow(name, prediction):
    """Exact networks for data N(3, 0.5^2): each, through its own path, ends at 3 + 0.5 x0."""
    p = path.build(name)

    def net(x, t, y):
        alpha, sigma, *_ = (c[:, None] for c in p.coefficients(t.double()))
        variance = sigma**2 + (0.5 * alpha) ** 2
        x1 = 3 + alpha * 0.25 / variance * (x - 3 * alpha)
        x0 = sigma / variance * (x - 3 * alpha)
        return p.target(x0, x1, t, prediction)

    x0 = torch.linspace(-2, 2, 9, dtype=torch.float64)[:, None]
    model = FlowModel(net, p, (2,), prediction=prediction)
    times = [0.0, *(p.t_to_linear(i / 100) for i in range(1, 100)), 1.0]
    x = solvers.solve(GuidedVelocity(model), x0, times, "heun").x
    assert torch.allclose(x, 3 + 0.5 * x0, atol=0.02)
