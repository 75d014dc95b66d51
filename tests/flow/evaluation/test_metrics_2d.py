"""Distances between sets of points, and the log-density of held-out ones."""

import math

import pytest
import torch

import datasets
from flow.evaluation import metrics_2d


def toys(name: str, n: int, **args) -> torch.Tensor:
    return datasets.build("toys", None, {"name": name, "n": n, **args}).images


def test_distances_between_points():
    a, b = toys("moons", 2000), toys("moons", 2000, seed=1)
    shift = torch.tensor([0.6, 0.8])
    assert metrics_2d.sliced_wasserstein(a, a) == 0
    # a shift by s moves every projection by s . direction, whose mean square over directions is |s|^2 / 2
    assert metrics_2d.sliced_wasserstein(a, a + shift) == pytest.approx(math.sqrt(0.5), rel=1e-6)
    assert metrics_2d.sliced_wasserstein(a, b[:1000]) < 0.1 < metrics_2d.sliced_wasserstein(a, toys("rings", 2000))
    for distance in (metrics_2d.mmd, metrics_2d.energy_distance):
        assert abs(distance(a, b)) < 0.005 and distance(a, b + shift) > 0.1
    # one point each: the kernel and the distance have a formula
    x, y = torch.zeros(2, 2), torch.full((2, 2), 3.0)
    assert metrics_2d.energy_distance(x, y) == pytest.approx(2 * math.sqrt(18))
    assert metrics_2d.mmd(x, y) == pytest.approx(2 - 2 * math.exp(-18 / 0.5))


@pytest.mark.parametrize("std", [0.05, 1.0, 2.0])
def test_held_out_log_density(std):
    """Of standard normal points under the flow to a normal distribution of another width, which has a formula: it is largest
    for the right one, and a flow that has collapsed loses."""

    def velocity(x, t, t_next=None):  # of the linear path from N(0, 1) to N(0, std^2): E[x1 - x0 | x_t]
        return x * (t * std**2 - (1 - t)) / (t**2 * std**2 + (1 - t) ** 2)

    x1 = torch.randn(200, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    expected = torch.distributions.Normal(0, std).log_prob(x1).sum(1).mean().item()
    assert metrics_2d.mean_log_likelihood(velocity, x1) == pytest.approx(expected, rel=2e-2)


def test_points_that_are_not_finite_are_refused():
    real = toys("moons", 100)
    with pytest.raises(ValueError, match="1 of 100 points of the samples are not finite"):
        metrics_2d.evaluate(real.index_fill(0, torch.tensor([3]), torch.nan), real)
