"""Power-function averages: widths, the update, inner products and fits against numerical integration."""

import math

import numpy as np
import pytest
import torch
from conftest import TwoWeights

from configs import schema
from flow import power_ema
from flow.power_ema import Profile, fit, gamma_of, inner_products, share
from flow.training.ema import PowerEma


def width_of(gamma: float) -> float:
    """sigma_rel of the profile with this exponent, in closed form."""
    return math.sqrt((gamma + 1) / (gamma + 3)) / (gamma + 2)


def density(profile: Profile, tau: np.ndarray) -> np.ndarray:
    gamma = gamma_of(profile.width)
    return np.where(tau <= profile.time, (gamma + 1) / profile.time * (tau / profile.time) ** gamma, 0)


def midpoints(end: float, n: int = 200_000) -> np.ndarray:
    return (np.arange(n) + 0.5) * end / n


@pytest.mark.parametrize("width", [0.01, 0.05, 0.1, 0.2, 0.28])
def test_width_is_the_relative_standard_deviation(width):
    tau = midpoints(7.0)
    p = density(Profile(width, 7.0), tau) * (tau[1] - tau[0])
    mean = (p * tau).sum()
    assert p.sum() == pytest.approx(1, rel=1e-4)
    assert math.sqrt((p * (tau - mean) ** 2).sum()) / 7 == pytest.approx(width, rel=1e-3)
    assert width_of(gamma_of(width)) == pytest.approx(width, rel=1e-9)


def test_known_exponents():
    """Those that the paper names for 0.05 and 0.10."""
    assert [round(gamma_of(width), 2) for width in (0.05, 0.10)] == [16.97, 6.94]
    assert power_ema.MAX_WIDTH == schema.MAX_EMA_WIDTH == pytest.approx(width_of(0))
    for width in (0, -0.1, 0.3, math.nan):
        with pytest.raises(ValueError, match=r"must be above 0 and below 0\.2887"):
            gamma_of(width)


def test_update_weighs_by_the_integral_of_the_profile():
    net, values = TwoWeights(5.0), np.sin(np.arange(1, 41))
    average = PowerEma(net, [0.05, 0.2])
    for t, value in enumerate(values, start=1):
        net.set(float(value))
        average.update(t)
    for i, width in enumerate(average.widths):
        edges = (np.arange(41) / 40) ** (gamma_of(width) + 1)
        assert average.state_dict(i)["weight"][0].item() == pytest.approx(np.diff(edges) @ values, abs=1e-6)
        assert average.state_dict(i)["weight"].dtype == torch.float32
    assert share(0.05, 1) == 1


def test_inner_products_are_integrals():
    profiles = [Profile(0.05, 3), Profile(0.2, 3), Profile(0.1, 8), Profile(0.28, 5)]
    tau = midpoints(8.0)
    values = np.stack([density(p, tau) for p in profiles])
    np.testing.assert_allclose(inner_products(profiles, profiles[1:]), values @ values[1:].T * 8.0 / len(tau), rtol=1e-3)


@pytest.mark.parametrize("width", [0.02, 0.07, 0.15, 0.25])
def test_fit_is_the_closest_sum(width):
    """No other factors with the sum 1 come closer, and the error is that of the integral."""
    stored = [Profile(w, t) for t in range(1, 9) for w in (0.05, 0.1)]
    target = Profile(width, 8)
    factors, error = fit(stored, target)
    tau = midpoints(8.0)
    values, sought = np.stack([density(p, tau) for p in stored]), density(target, tau)

    def missed(candidate: np.ndarray) -> float:
        return math.sqrt(((candidate @ values - sought) ** 2).sum() / (sought**2).sum())

    assert factors.sum() == pytest.approx(1, abs=1e-9)
    assert missed(factors) == pytest.approx(error, abs=1e-3)
    rng = np.random.default_rng(0)
    for _ in range(20):
        change = rng.normal(size=len(factors)) * 0.03
        assert missed(factors + change - change.mean()) > missed(factors)


def test_fit_of_a_stored_profile_is_that_profile():
    stored = [Profile(w, t) for t in range(1, 41) for w in (0.05, 0.1)]
    factors, error = fit(stored, stored[-1])
    assert error < 1e-6
    np.testing.assert_allclose(factors, np.eye(80)[-1], atol=1e-9)
