"""Deviation from straight paths, and inversion."""

import pytest
import torch

from flow import solvers
from flow.likelihood import T_MAX, invert
from flow.sampling.generate import straightness_deviation
from flow.solvers import time_grids


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
