"""Sampling errors of metrics: intervals hold what they say, for Gaussians whose distance is known."""

import numpy as np
import pytest
import torch

from flow.evaluation.frechet import extrapolated_distance, frechet_distance
from flow.evaluation.intervals import (
    NORMAL_95,
    block_of,
    frechet_standard_error,
    share_standard_error,
)
from flow.evaluation.metrics import kernel_variance
from flow.evaluation.moments import Moments


def draws(d: int, n: int, repeats: int, shift: float):
    """(distances, standard errors) of sets of n skewed samples in d dimensions to a reference Gaussian."""
    rng = np.random.default_rng(0)
    mixing = rng.standard_normal((d, d)) / d**0.5
    mu, sigma = np.zeros(d), mixing @ mixing.T + 0.05 * np.eye(d)
    distances, errors = [], []
    for _ in range(repeats):
        x = np.maximum(rng.standard_normal((n, d)) @ np.linalg.cholesky(sigma).T, -shift)
        samples = Moments(x.mean(0), np.cov(x.T))
        distances.append(frechet_distance(samples, Moments(mu, sigma)))
        errors.append(frechet_standard_error(x.astype(np.float32), samples, Moments(mu, sigma)))
    return np.array(distances), np.array(errors)


@pytest.mark.parametrize("shift", [0.2, 1.0])
def test_intervals_hold_the_mean_distance(shift):
    """95% intervals of 200 sets hold the mean distance at their n in 90 to 99.5% of the sets."""
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
    wider = np.c_[x, np.zeros(50)]
    error = frechet_standard_error(x, Moments.of(x), Moments(np.ones(3), np.eye(3)))
    padded = Moments(np.r_[np.ones(3), 0], np.diag([1.0, 1, 1, 0]))
    assert frechet_standard_error(wider, Moments.of(wider), padded) == pytest.approx(error)


@pytest.mark.parametrize("x", [np.eye(4), np.ones((9, 4))], ids=["too few", "equal"])
def test_samples_that_have_no_interval(x):
    assert frechet_standard_error(x, Moments.of(x), Moments(np.zeros(4), np.eye(4))) is None


def coverage(values: np.ndarray, errors: np.ndarray, target: float) -> float:
    return float((abs(values - target) < NORMAL_95 * errors).mean())


def moved_gaussian(d: int, n: int, repeats: int):
    """(distance, reference, sets): `repeats` sets of n samples of a Gaussian at a known distance to the reference."""
    rng = np.random.default_rng(1)
    mixing = rng.standard_normal((d, d)) / d**0.5
    mu, sigma = np.zeros(d), mixing @ mixing.T + 0.05 * np.eye(d)
    root = 1.2 * np.linalg.cholesky(sigma)
    sets = (rng.standard_normal((n, d)) @ root.T + 0.2 for _ in range(repeats))
    reference = Moments(mu, sigma)
    return frechet_distance(Moments(mu + 0.2, root @ root.T), reference), reference, sets


def test_limit_of_many_samples():
    """The interval of fd_inf holds the known distance in 90 to 98% of 200 sets, and its bias is a small part of the plain
    distance's."""
    distance, reference, sets = moved_gaussian(8, 400, 200)
    plain, limits, errors = [], [], []
    for x in sets:
        samples = Moments.of(x)
        plain.append(frechet_distance(samples, reference))
        limit, error = extrapolated_distance(x, samples, reference)
        limits.append(limit)
        errors.append(error)
    plain, limits = np.array(plain), np.array(limits)
    assert abs(limits.mean() - distance) < 0.25 * (plain.mean() - distance)
    assert limits.std() < 1.1 * plain.std()
    assert 0.90 <= coverage(limits, np.array(errors), distance) <= 0.98


def test_limit_needs_two_images_a_feature():
    for x in (np.random.default_rng(0).standard_normal((79, 8)), np.ones((200, 8))):
        assert extrapolated_distance(x, Moments.of(x), Moments(np.zeros(8), np.eye(8))) is None


@pytest.mark.parametrize("order", ["in turn", "sorted"])
def test_blocks_do_not_follow_the_classes(order):
    """Each block has about its share of each of ten classes, in turn or one after another."""
    k = np.arange(10_000)
    labels = k % 10 if order == "in turn" else k // 1000
    for count in (2, 5, 10):
        table = np.zeros((count, 10))
        np.add.at(table, (block_of(k, count), labels), 1)
        assert abs(table - 1000 / count).max() <= 4


@pytest.mark.parametrize("p", [0.01, 0.3, 0.97])
def test_interval_of_a_share(p):
    """Of 400 samples; a share of 0 or 1 has an interval, too."""
    shares = np.random.default_rng(0).binomial(400, p, 5000) / 400
    errors = np.array([share_standard_error(share, 400) for share in shares])
    assert 0.90 <= coverage(shares, errors, p) <= 0.995
    assert 0 < NORMAL_95 * share_standard_error(1.0, 400) < 3 / 400


def test_interval_of_the_kernel_distance():
    """That of all pairs, which is unbiased, over 200 sets."""
    real = torch.randn(500, 6, generator=torch.Generator().manual_seed(0))

    def distance(x: torch.Tensor) -> float:
        xx, xy = ((x @ z.T / 6 + 1) ** 3 for z in (x, real))
        return ((xx.sum() - xx.trace()) / (len(x) * (len(x) - 1)) - 2 * xy.mean()).item()

    sets = [1.1 * torch.randn(200, 6, generator=torch.Generator().manual_seed(seed)) + 0.1 for seed in range(1, 201)]
    values, errors = np.array([distance(x) for x in sets]), np.array([kernel_variance(x, real) ** 0.5 for x in sets])
    assert 0.90 <= coverage(values, errors, values.mean()) <= 0.98
