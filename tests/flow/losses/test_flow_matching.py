"""The method against its formulas: random keys, prior, law of t, labels and guidance, path, loss and its minimiser."""

import math

import numpy as np
import pytest
import torch
from conftest import loss_at
from scipy import stats
from torch import Tensor

from flow import path, solvers, time_samplers
from flow.guidance import GuidedVelocity, drop_labels
from flow.losses.flow_matching import FlowMatching
from flow.model import FlowModel
from flow.noise import gaussian_noise, generator, generators
from flow.path import LinearPath

PATH = LinearPath()
LOSS = FlowMatching(PATH, "velocity", time_samplers.build("uniform"))


# ---- random numbers


def test_a_generator_is_a_function_of_its_key():
    assert generator("time", 1, 2).random(5).tolist() == generator("time", 1, 2).random(5).tolist()


def test_generators_in_a_row_are_those_one_by_one():
    """Also after draws that leave half a word in the buffer."""
    for g, p in zip(generators("noise", 7, positions=[3, 0, np.int64(2**40)]), [3, 0, 2**40], strict=True):
        alone = generator("noise", 7, p)
        for draw in (lambda g: g.integers(2, size=3, dtype=np.int32), lambda g: g.standard_normal(5, dtype=np.float32)):
            assert draw(g).tolist() == draw(alone).tolist()


def test_different_keys_differ():
    keys = [
        ("time", 0, 1), ("time", 1, 0), ("flip", 0, 1), ("time", 0), ("time", 0, 1, 0), ("time", 0, -1), ("time", 10),
        ("time", 1, 1), ("time", 2**32, 1), ("time", 2**64, 1), ("time", "0", 1),
    ]  # fmt: skip
    draws = {generator(*key).random() for key in keys}
    assert len(draws) == len(keys)


@pytest.mark.parametrize("far", [2**31, 2**32, 2**40, 2**64])
def test_seeds_and_indices_far_apart_differ(far):
    """Generators that keep 32 bits of their seed repeat themselves here."""
    assert not torch.equal(gaussian_noise("s", 1, [0], (4,)), gaussian_noise("s", 1 + far, [0], (4,)))
    assert not torch.equal(gaussian_noise("s", 1, [3], (4,)), gaussian_noise("s", 1, [3 + far], (4,)))


def test_neighbouring_generators_are_uncorrelated():
    draws = np.stack([generator("time", 0, step).standard_normal(2000) for step in range(20)])
    off_diagonal = np.corrcoef(draws)[~np.eye(20, dtype=bool)]
    assert np.abs(off_diagonal).max() < 4.5 / 2000**0.5  # 190 pairs


# ---- prior


def test_noise_of_an_image_depends_on_its_index_alone():
    whole = gaussian_noise("sample", 8888, range(10), (3, 4, 5))
    assert whole.shape == (10, 3, 4, 5) and whole.dtype == torch.float32
    assert torch.equal(gaussian_noise("sample", 8888, [7, 2], (3, 4, 5)), whole[[7, 2]])
    assert torch.equal(gaussian_noise("sample", 8888, torch.tensor([7]), (3, 4, 5)), whole[7:8])
    assert torch.equal(gaussian_noise("sample", 8888, np.array([7]), (3, 4, 5)), whole[7:8])
    assert not torch.equal(gaussian_noise("train", 8888, [7], (3, 4, 5)), whole[7:8])
    assert gaussian_noise("sample", 8888, [], (3, 4, 5)).shape == (0, 3, 4, 5)


def test_noise_is_standard_normal():
    x0 = gaussian_noise("sample", 0, range(400), (10, 10)).double()  # 40,000 numbers
    n = x0.numel()
    for moment, expected, variance in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)):
        assert abs(x0.pow(moment).mean() - expected) < 4 * (variance / n) ** 0.5
    across = x0.mean(0)  # of a pixel over images: images are independent of each other
    assert across.var() == pytest.approx(1 / 400, rel=4 * (2 / 100) ** 0.5)
    assert stats.kstest(x0.flatten(), "norm").pvalue > 1e-4


# ---- law of t


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


@pytest.mark.parametrize(
    ("name", "args", "cdf"),
    [
        ("uniform", {}, stats.uniform.cdf),
        ("logit_normal", {}, logit_normal_cdf(0, 1)),
        ("logit_normal", {"mean": -1.2, "std": 0.5}, logit_normal_cdf(-1.2, 0.5)),
        ("logit_normal", {"mean": 1, "std": 2}, logit_normal_cdf(1, 2)),
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
        ("logit_normal", {"std": 0.0}, r"std=0.0: must be greater than 0"),
        ("logit_normal", {"std": -1}, r"std=-1: must be greater than 0"),
        ("logit_normal", {"std": math.nan}, r"std=nan"),
        ("logit_normal", {"mean": math.nan}, r"mean=nan"),
    ],
)
def test_wrong_laws(name, args, message):
    with pytest.raises(ValueError, match=message):
        time_samplers.build(name, **args)


# ---- labels and guidance


def test_labels_are_dropped_at_the_given_rate():
    n, y = 20_000, torch.arange(20_000) % 10
    dropped = drop_labels(y, slice(0, n), 0, 5, n, 0.1, null=10)
    gone = dropped == 10
    assert dropped.dtype == torch.int64 and torch.equal(dropped[~gone], y[~gone])
    assert abs(gone.double().mean() - 0.1) < 4 * (0.1 * 0.9 / n) ** 0.5
    assert torch.equal(drop_labels(y, slice(0, n), 0, 5, n, 0.0, null=10), y)
    assert drop_labels(y, slice(0, n), 0, 5, n, 1.0, null=10).eq(10).all()
    for seed, step in ((0, 6), (1, 5)):
        assert not torch.equal(drop_labels(y, slice(0, n), seed, step, n, 0.1, null=10), dropped)


def test_dropped_labels_do_not_depend_on_the_slice():
    y = torch.arange(16)
    whole = drop_labels(y, slice(0, 16), 0, 1, 16, 0.5, null=99)
    assert 0 < (whole == 99).sum() < 16
    parts = [drop_labels(y[i : i + 4], slice(i, i + 4), 0, 1, 16, 0.5, null=99) for i in range(0, 16, 4)]
    assert torch.equal(torch.cat(parts), whole)


class Net:
    """A velocity that depends on x, t and the label, not linearly; counts the rows that it is given."""

    def __init__(self):
        self.calls: list[int] = []

    def __call__(self, x: Tensor, t: Tensor, y: Tensor | None) -> Tensor:
        assert x.dtype == t.dtype == torch.float32 and t.shape == (len(x),)
        self.calls.append(len(x))
        label = torch.zeros(len(x)) if y is None else y.float()
        return torch.sin(x * (1 + label[:, None]) + t[:, None])


@pytest.mark.parametrize(("scale", "forwards"), [(0, 1), (1, 1), (2.5, 2), (-1, 2)])
def test_guidance_is_the_formula(scale, forwards):
    x, y, null = torch.randn(4, 3, dtype=torch.float64), torch.tensor([0, 1, 2, 1]), 5
    t = torch.full((4,), 0.3)
    v_c, v_u = Net()(x.float(), t, y), Net()(x.float(), t, torch.full((4,), null))
    net = Net()
    velocity = GuidedVelocity(net, y, null, scale)
    v = velocity(x, 0.3)
    assert torch.allclose(v, (v_u + scale * (v_c - v_u)).double(), atol=1e-6)
    assert v.dtype == torch.float64  # the solver's
    velocity(x, 0.4)
    # network evaluations per image: both halves go as one batch, and count as two
    assert velocity.forwards == 2 * forwards == sum(net.calls) / 4 and len(net.calls) == 2


def test_without_labels_there_is_nothing_to_guide():
    net = Net()
    velocity = GuidedVelocity(net)
    x = torch.randn(4, 3)
    assert torch.equal(velocity(x, 0.5), torch.sin(x + 0.5)) and velocity.forwards == 1


# ---- path and loss


@pytest.mark.parametrize("shape", [(5,), (5, 2), (5, 3, 4, 4)])
def test_the_path_begins_at_noise_and_ends_at_data(shape):
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
def test_paths_begin_at_the_noise_and_end_at_the_data(name):
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
def test_a_network_of_any_path_and_prediction_is_the_same_flow(name, prediction):
    """Exact networks for data N(3, 0.5^2): each, through its own path, ends at 3 + 0.5 x0."""
    p = path.build(name)

    def net(x, t, y):
        alpha, sigma, *_ = (c[:, None] for c in p.coefficients(t.double()))
        variance = sigma**2 + (0.5 * alpha) ** 2
        x1 = 3 + alpha * 0.25 / variance * (x - 3 * alpha)
        x0 = sigma / variance * (x - 3 * alpha)
        return p.target(x0, x1, t, prediction)

    x0 = torch.linspace(-2, 2, 9, dtype=torch.float64)[:, None]
    model = FlowModel(net, p, prediction)
    times = [0.0, *(p.t_to_linear(i / 100) for i in range(1, 100)), 1.0]
    x = solvers.solve(GuidedVelocity(model), x0, times, "heun").x
    assert torch.allclose(x, 3 + 0.5 * x0, atol=0.02)


def test_the_loss_by_hand():
    """Two images of two pixels and the network 2 x + t + y, on numbers that can be followed on paper."""
    x0 = torch.tensor([[1.0, 0.0], [2.0, -2.0]])[:, None, None]
    x1 = torch.tensor([[3.0, 4.0], [0.0, 2.0]])[:, None, None]
    t, y = torch.tensor([0.5, 0.25]), torch.tensor([1, 0])

    def net(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        return 2 * x + (t + y)[:, None, None, None]

    loss = loss_at(LOSS, net, x0, x1, t, y).per_sample
    # image 0: xt = (2, 2),      net (5.5, 5.5),      v (2, 4):  residuals 3.5, 1.5
    # image 1: xt = (1.5, -1.0), net (3.25, -1.75),   v (-2, 4): residuals 5.25, -5.75
    expected = [(3.5**2 + 1.5**2) / 2, (5.25**2 + 5.75**2) / 2]
    assert loss.shape == (2,) and loss.tolist() == pytest.approx(expected)


def test_the_loss_is_float32_whatever_the_network_gives():
    x0, x1 = torch.zeros(1, 2), torch.full((1, 2), 1 + 2**-12)  # not a bfloat16 number
    loss = loss_at(LOSS, lambda x, t, y: torch.ones_like(x).bfloat16(), x0, x1, torch.zeros(1)).per_sample
    assert loss.dtype == torch.float32 and loss.item() == pytest.approx(2**-24)


@pytest.mark.parametrize("t", [0.0, 0.2, 0.7, 1.0])
def test_the_minimiser_is_the_closed_form_velocity(t):
    """x0 ~ N(0, 1), x1 ~ N(m, s^2) independent: E[x1 - x0 | x_t = x] is affine in x. The expectation of the loss is exact,
    by Gauss-Hermite quadrature; at the closed form its gradient vanishes, and the curvature is positive."""
    m, s = 1.5, 0.5
    nodes, weights = np.polynomial.hermite_e.hermegauss(5)
    z0, z1 = (torch.tensor(z.ravel(), dtype=torch.float32)[:, None] for z in np.meshgrid(nodes, nodes))
    weight = torch.tensor(np.outer(weights, weights).ravel() / (2 * math.pi), dtype=torch.float32)

    def expected_loss(slope: Tensor, intercept: Tensor) -> Tensor:
        def net(x: Tensor, t: Tensor, y: None) -> Tensor:
            return slope * x + intercept

        return (weight * loss_at(LOSS, net, z0, m + s * z1, torch.full((25,), t)).per_sample).sum()

    variance = t**2 * s**2 + (1 - t) ** 2
    slope = (t * s**2 - (1 - t)) / variance
    best = torch.tensor([slope, m - slope * t * m], requires_grad=True)
    (gradient,) = torch.autograd.grad(expected_loss(*best), best)
    assert gradient.abs().max() < 1e-4
    for shift in ((0.1, 0.0), (-0.1, 0.0), (0.0, 0.1), (0.0, -0.1)):
        assert expected_loss(*(best.detach() + torch.tensor(shift))) > expected_loss(*best) + 1e-3
