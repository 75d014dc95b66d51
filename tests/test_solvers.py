"""Solvers: the declared order is the measured one, NFE is what the network was called, the data end stays untouched."""

import math

import pytest
import torch

from flow import solvers
from flow.guidance import GuidedVelocity
from flow.solvers import grid
from flow.solvers.runge_kutta import TABLEAUX


def rotation(x: torch.Tensor, t: float) -> torch.Tensor:
    """dx/dt = cos(t) A x with A the rotation generator: x(1) is x(0) turned by sin(1)."""
    return math.cos(t) * torch.stack([-x[:, 1], x[:, 0]], dim=1)


def rotation_error(method: str, steps: int) -> float:
    x = torch.tensor([[1.0, 0.5]], dtype=torch.float64)
    angle = math.sin(1.0)
    turn = torch.tensor([[math.cos(angle), math.sin(angle)], [-math.sin(angle), math.cos(angle)]], dtype=torch.float64)
    return (solvers.solve(rotation, x, grid.uniform(steps), method).x - x @ turn).norm().item()


@pytest.mark.parametrize("method", solvers.METHODS)
def test_measured_order_is_the_declared_one(method):
    steps = [16, 32, 64, 128]
    logs = [math.log2(rotation_error(method, n)) for n in steps]
    slope = (logs[0] - logs[-1]) / (len(steps) - 1)
    assert slope == pytest.approx(TABLEAUX[method].order, abs=0.15)


@pytest.mark.parametrize("tableau", TABLEAUX.values(), ids=TABLEAUX)
def test_tableaux_are_consistent(tableau):
    """Row sums of a equal c, and the quadrature is exact for polynomials below the order."""
    assert [sum(row) for row in tableau.a] == pytest.approx(list(tableau.c))
    for power in range(tableau.order):
        moment = sum(b * c**power for b, c in zip(tableau.b, tableau.c, strict=True))
        assert moment == pytest.approx(1 / (power + 1))


@pytest.mark.parametrize(("method", "expected"), [("euler", 7), ("midpoint", 14), ("heun", 13), ("heun3", 21), ("rk4", 27)])
@pytest.mark.parametrize("scale", [1.0, 2.0])
def test_nfe_equals_the_calls_inside_the_network(method, expected, scale):
    """Seven steps; guidance doubles the samples that go through the network, not the velocity evaluations."""
    images, times = [], []

    def net(x, t, y):
        images.append(len(x))
        times.append(t.max().item())
        return x * 0

    y = torch.zeros(3, dtype=torch.long)
    velocity = GuidedVelocity(net, y, null=10, scale=scale)
    solution = solvers.solve(velocity, torch.zeros(3, 1, 2, 2), grid.uniform(7), method)
    assert solution.nfe == len(images) == expected
    assert velocity.forwards == sum(images) / 3 == (expected if scale == 1 else 2 * expected)
    assert max(times) < 1  # a velocity at the data end would leave noise in the image


@pytest.mark.parametrize("method", solvers.METHODS)
def test_no_noise_is_left_when_the_data_is_one_point(method):
    """The exact velocity towards a point mass at mu jumps at t = 1; every method must still land on mu."""
    mu = 0.7

    def velocity(x, t):
        return (mu - x) / (1 - t) if t < 1 else x  # at t = 1 a trained network answers E[x1 - x0 | x1] = x1

    x = torch.randn(100, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    landed = solvers.solve(velocity, x, grid.uniform(5), method).x
    assert (landed - mu).abs().max() < 0.02 * x.std()


def test_solver_keeps_the_dtype_and_leaves_its_input_alone():
    for dtype in (torch.float32, torch.float64):
        x = torch.ones(2, 2, dtype=dtype)
        assert solvers.solve(rotation, x, grid.uniform(3), "heun").x.dtype == dtype
        assert torch.equal(x, torch.ones(2, 2, dtype=dtype))


def test_unknown_method_and_too_few_steps_are_named():
    with pytest.raises(ValueError, match="'foo' is not a solver; choose one of euler"):
        solvers.solve(rotation, torch.zeros(1, 2), grid.uniform(1), "foo")
    with pytest.raises(ValueError, match="0 steps"):
        grid.uniform(0)
