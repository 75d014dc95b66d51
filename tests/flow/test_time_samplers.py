"""Laws of t: strata, distributions, wrong arguments."""

import math

import numpy as np
import pytest
import torch
from scipy import stats

from flow import time_samplers


@pytest.mark.parametrize("n", [1, 7, 128])
def test_one_uniform_in_each_stratum(n):
    u = time_samplers.stratified(0, 3, n, 2)
    assert u.shape == (n, 2) and u.dtype == torch.float64 and u.min() > 0 and u.max() < 1
    assert (u * n).long().sort(0).values.tolist() == [[i, i] for i in range(n)]
    assert torch.equal(u[:, :1], time_samplers.stratified(0, 3, n))
    assert not torch.equal(u, time_samplers.stratified(0, 4, n, 2)) and not torch.equal(u, time_samplers.stratified(1, 3, n, 2))


def test_strata_are_in_random_order():
    """A row of the batch is one process's share and one image's place: each row must see every t."""
    first = torch.stack([time_samplers.stratified(0, step, 8)[:2, 0] for step in range(2000)])
    assert stats.kstest(first[:, 0], "uniform").pvalue > 1e-4
    counts = torch.zeros(8, 8).index_put_(tuple((first * 8).long().T), torch.ones(()), accumulate=True)
    assert not counts.diagonal().any()  # two rows never share a stratum
    assert stats.chisquare(counts[~torch.eye(8, dtype=torch.bool)].double()).pvalue > 1e-4


def logit_normal_cdf(mean: float, std: float):
    return lambda t: stats.norm.cdf((np.log(t) - np.log1p(-t) - mean) / std)


def u_shaped_cdf(a: float):
    """Of the density proportional to exp(a t) + exp(a (1 - t)), integrated by hand."""
    return lambda t: (np.exp(a * t) - np.exp(a * (1 - t)) - 1 + np.exp(a)) / (2 * (np.exp(a) - 1))


def edm_cdf(mean: float, std: float):
    """Of t = 1 / (1 + sigma) with log sigma ~ N(mean, std^2): that sigma is at least (1 - t) / t."""
    return lambda t: stats.norm.sf(np.log((1 - t) / t), mean, std)


@pytest.mark.parametrize(
    ("name", "args", "cdf"),
    [
        ("uniform", {}, stats.uniform.cdf),
        ("logit_normal", {}, logit_normal_cdf(0, 1)),
        ("logit_normal", {"mean": -1.2, "std": 0.5}, logit_normal_cdf(-1.2, 0.5)),
        ("logit_normal", {"mean": 1, "std": 2}, logit_normal_cdf(1, 2)),
        ("exponential", {}, lambda t: (10 - 10 ** (1 - t)) / 9),
        ("exponential", {"a": 0.5}, lambda t: (0.5 - 0.5 ** (1 - t)) / -0.5),
        ("u_shaped", {}, u_shaped_cdf(4)),
        ("u_shaped", {"a": 1}, u_shaped_cdf(1)),
        ("edm_skewed", {}, edm_cdf(-1.2, 1.2)),
        ("edm_skewed", {"mean": 0.5, "std": 1}, edm_cdf(0.5, 1)),
    ],
)
def test_laws(name, args, cdf):
    law = time_samplers.build(name, **args)
    n = 1000
    t = law(time_samplers.stratified(0, 0, n)[:, 0]).float()
    assert t.shape == (n,) and t.dtype == torch.float32 and t.min() >= 0 and t.max() <= 1
    u = torch.linspace(0.01, 0.99, 99, dtype=torch.float64)
    assert cdf(law(u).numpy()) == pytest.approx(u.numpy())  # the inverse of the distribution function
    # one draw in each stratum: the empirical distribution is within 1/n of the exact one (independent draws: 0.03)
    assert stats.kstest(t.double(), cdf).statistic < 1.01 / n
    # and one row over many steps follows the law too
    rows = torch.stack([law(time_samplers.stratified(0, step, 4)[2, 0]).float() for step in range(n)])
    assert stats.kstest(rows.double(), cdf).pvalue > 1e-4


@pytest.mark.parametrize(
    ("name", "args", "message"),
    [
        ("normal", {}, r"unknown time sampler 'normal'; choose from uniform, logit_normal"),
        ("uniform", {"mean": 0.0}, r"uniform has no argument 'mean'; it takes none"),
        ("logit_normal", {"sd": 1.0}, r"logit_normal has no argument 'sd'; it takes mean, std"),
        ("logit_normal", {"u": 1.0}, r"logit_normal has no argument 'u'"),
        ("logit_normal", {"mean": "0"}, r"mean='0': must be a finite number"),
        ("logit_normal", {"std": True}, r"std=True: must be a finite number"),
        ("logit_normal", {"mean": 10**400}, r"must be a finite number"),
        ("logit_normal", {"std": 0.0}, r"std=0.0: must be greater than 0"),
        ("logit_normal", {"std": -1}, r"std=-1: must be greater than 0"),
        ("logit_normal", {"std": math.nan}, r"std=nan"),
        ("logit_normal", {"mean": math.nan}, r"mean=nan"),
        ("exponential", {"a": 1}, r"a=1: must be greater than 0, at most 1e6, and not 1"),
    ],
)
def test_wrong_laws(name, args, message):
    with pytest.raises(ValueError, match=message):
        time_samplers.build(name, **args)
