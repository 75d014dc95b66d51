"""Tuned time grids: the cheapest path through a fine trajectory, a descent that never gets worse."""

import itertools

import pytest
import torch

from flow import solvers
from flow.solvers import grid_optimization, time_grids


def velocity(x: torch.Tensor, t: float, t_next=None) -> torch.Tensor:
    """Almost straight but for a bend around t = 0.8."""
    return torch.ones_like(x) + 30 * x.sign() * torch.exp(torch.tensor(-((t - 0.8) ** 2) / 0.002))


@pytest.fixture(scope="module")
def fine():
    return grid_optimization.reference_trajectory(velocity, torch.linspace(-2, 2, 8, dtype=torch.float64)[:, None], 12)


def test_the_shortest_grid_is_the_best_of_all(fine):
    states, velocities = fine

    def price(times: tuple[int, ...]) -> float:
        total = 0.0
        for i, j in itertools.pairwise(times):
            total += (states[i] + (j - i) / 12 * velocities[i] - states[j]).square().mean().sqrt().item()
        return total

    found = grid_optimization.dynamic_programming_grid(states, velocities, 4)
    best = min(((0, *inner, 12) for inner in itertools.combinations(range(1, 12), 3)), key=price)
    assert found == pytest.approx([i / 12 for i in best])
    with pytest.raises(ValueError, match="13 steps: must be from 1 to the 12"):
        grid_optimization.dynamic_programming_grid(states, velocities, 13)


def test_descent_ends_closer_and_in_order():
    x0 = torch.linspace(-2, 2, 8, dtype=torch.float64)[:, None]
    target = solvers.solve(velocity, x0, time_grids.uniform(2000), "heun").x

    def error(times: list[float]) -> float:
        return (solvers.solve(velocity, x0, times, "euler").x - target).square().mean().sqrt().item()

    start = time_grids.uniform(5)
    found = grid_optimization.refine_grid(error, start, 150)
    assert error(found) < 0.5 * error(start)
    assert found[0] == 0 and found[-1] == 1 and all(a < b for a, b in itertools.pairwise(found))
    assert grid_optimization.refine_grid(error, [0.0, 1.0], 10) == [0.0, 1.0]
