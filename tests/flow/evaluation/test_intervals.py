"""Sampling error of the Frechet distance."""

import numpy as np
import pytest

from flow.evaluation.intervals import NORMAL_95, frechet_standard_error
from flow.evaluation.frechet import frechet_distance


def draws(d: int, n: int, repeats: int, shift: float):
    """(distances, standard errors) of sets of n skewed samples in d dimensions to a reference Gaussian."""
    rng = np.random.default_rng(0)
    mixing = rng.standard_normal((d, d)) / d**0.5
    mu, sigma = np.zeros(d), mixing @ mixing.T + 0.05 * np.eye(d)
    distances, errors = [], []
    for _ in range(repeats):
        x = np.maximum(rng.standard_normal((n, d)) @ np.linalg.cholesky(sigma).T, -shift)
        distances.append(frechet_distance(x.mean(0), np.cov(x.T), mu, sigma))
        errors.append(frechet_standard_error(x.astype(np.float32), mu, sigma))
    return np.array(distances), np.array(errors)


@pytest.mark.parametrize("shift", [0.2, 1.0])
def test_intervals_hold_the_mean_distance(shift):
    """95 % intervals of 200 sets hold the mean distance at their n in 90 to 99.5 % of the sets."""
    distances, errors = draws(4, 300, 200, shift)
    share = (abs(distances - distances.mean()) < NORMAL_95 * errors).mean()
    assert 0.90 <= share <= 0.995
    assert errors.mean() == pytest.approx(distances.std(), rel=0.15)


def test_samples_of_the_reference_get_a_wide_interval():
    """Without any difference the linear term vanishes; what is left of it is on the safe side."""
    distances, errors = draws(4, 300, 200, np.inf)
    assert distances.std() < errors.mean() < 2.5 * distances.std()


def test_a_constant_feature_changes_nothing():
    rng = np.random.default_rng(1)
    x = rng.standard_normal((50, 3))
    error = frechet_standard_error(x, np.ones(3), np.eye(3))
    padded = frechet_standard_error(np.c_[x, np.zeros(50)], np.r_[np.ones(3), 0], np.diag([1.0, 1, 1, 0]))
    assert padded == pytest.approx(error)


def test_too_few_samples_have_no_interval():
    assert frechet_standard_error(np.eye(4), np.zeros(4), np.eye(4)) is None


def test_equal_samples_have_no_interval():
    assert frechet_standard_error(np.ones((9, 4)), np.zeros(4), np.eye(4)) is None
