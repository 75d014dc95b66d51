"""Likelihood: exact for a Gaussian, unbiased with probes, bits per dimension of real images by the command."""

import math
import re

import pytest
import torch
from conftest import succeed

from flow.likelihood import bits_per_dimension, log_likelihood
from flow.solvers import grid

MEAN, STD = 3.0, 0.5


def velocity(x: torch.Tensor, t: float) -> torch.Tensor:
    """The exact velocity of the linear path to N(3, 0.5^2 I)."""
    return MEAN + (STD**2 * t - (1 - t)) / ((1 - t) ** 2 + (STD * t) ** 2) * (x - MEAN * t)


@pytest.fixture(scope="module")
def data() -> tuple[torch.Tensor, torch.Tensor]:
    x1 = MEAN + STD * torch.randn(50, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    log_p = -0.5 * ((x1 - MEAN) / STD) ** 2 - 0.5 * math.log(2 * math.pi) - math.log(STD)
    return x1, log_p.sum(1)


@pytest.mark.parametrize(
    ("method", "times", "options"), [("dopri5", None, {"rtol": 1e-6, "atol": 1e-6}), ("rk4", grid.uniform(40), {})]
)
def test_a_gaussian_to_a_thousandth_of_a_nat(data, method, times, options):
    x1, expected = data
    log_p, x0, nfe = log_likelihood(velocity, x1, method, times, **options)
    assert (log_p - expected).abs().max() < 1e-3
    assert torch.allclose(x0, (x1 - MEAN) / STD, atol=1e-3) and nfe > 40


def test_probes_are_unbiased():
    """A velocity A x with a full matrix: one probe errs, the mean over many is the trace."""
    a = torch.tensor([[0.3, 0.8], [-0.5, 0.4]], dtype=torch.float64)
    x1 = torch.randn(1, 2, dtype=torch.float64).expand(4000, 2)
    probes = torch.randint(2, (1, 4000, 2), generator=torch.Generator().manual_seed(0)).double() * 2 - 1
    exact, *_ = log_likelihood(lambda x, t: x @ a.T, x1[:1], "rk4", grid.uniform(20))
    estimates, *_ = log_likelihood(lambda x, t: x @ a.T, x1, "rk4", grid.uniform(20), probes=probes)
    assert estimates.std() > 0.1
    assert estimates.mean().item() == pytest.approx(exact.item(), abs=4 * estimates.std().item() / 4000**0.5)


def test_bits_of_a_uniform_density():
    """Uniform over the 256 levels, a density of 127.5 / 256 a dimension, is 8 bits a dimension."""
    log_p = torch.tensor([10 * math.log(127.5 / 256)])
    assert bits_per_dimension(log_p, 10).item() == pytest.approx(8)


def test_command(tiny_run):
    result = succeed("-m", "scripts.likelihood", "--weights", tiny_run, "--n_images", "6", "--bspp", "3", "--rtol", "0.05")
    bits = float(re.search(r"([\d.]+) ± [\d.]+ bits per dimension", result.stdout).group(1))
    assert 3 < bits < 20  # of an untrained network: noise
