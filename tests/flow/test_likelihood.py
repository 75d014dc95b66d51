"""Likelihood: exact for a Gaussian, unbiased with probes, bits per dimension."""

import math

import pytest
import torch

import models
from flow import solvers
from flow.likelihood import bits_per_dimension, dequantize, invert, log_likelihood
from flow.model import FlowModel
from flow.path import LinearPath
from flow.sampling import Sampler
from flow.sampling.images import to_uint8
from flow.solvers import time_grids

MEAN, STD = 3.0, 0.5


def velocity(x: torch.Tensor, t: float, t_next=None) -> torch.Tensor:
    """The exact velocity of the linear path to N(3, 0.5^2 I)."""
    return MEAN + (STD**2 * t - (1 - t)) / ((1 - t) ** 2 + (STD * t) ** 2) * (x - MEAN * t)


@pytest.fixture(scope="module")
def data() -> tuple[torch.Tensor, torch.Tensor]:
    x1 = MEAN + STD * torch.randn(50, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    log_p = -0.5 * ((x1 - MEAN) / STD) ** 2 - 0.5 * math.log(2 * math.pi) - math.log(STD)
    return x1, log_p.sum(1)


@pytest.mark.parametrize(
    ("method", "times", "options"), [("dopri5", None, {"rtol": 1e-6, "atol": 1e-6}), ("rk4", time_grids.uniform(40), {})]
)
def test_a_gaussian_to_a_thousandth_of_a_nat(data, method, times, options):
    x1, expected = data
    log_p, x0, nfe = log_likelihood(velocity, x1, method, times, **options)
    assert (log_p - expected).abs().max() < 1e-3
    assert torch.allclose(x0, (x1 - MEAN) / STD, atol=1e-3) and nfe > 40


@pytest.mark.filterwarnings("ignore:Functional iteration did not converge")  # in the strong field
@pytest.mark.parametrize("method", solvers.DETERMINISTIC)
def test_likelihood_and_inversion_stay_in_the_interval(method):
    def field(strength: float):
        def velocity(x, t, t_next=None):
            if not 0 <= t < 1:
                raise RuntimeError(f"velocity at t = {t}")
            return strength * x

        return velocity

    x1 = torch.linspace(-2, 2, 6, dtype=torch.float64).view(2, 3)
    options = {"rtol": 1e-2, "atol": 1e-2} if method in solvers.HAS_TOLERANCES else {}
    for strength in (-10.0, 1e-9, 10.0):
        log_p, _, nfe = log_likelihood(field(strength), x1, method, time_grids.uniform(6), **options)
        assert log_p.isfinite().all() and nfe > 2
        assert invert(field(strength), x1, x1, 6, method).isfinite().all()


def test_probes_are_unbiased():
    """A velocity A x with a full matrix: one probe errs, the mean over many is the trace."""
    a = torch.tensor([[0.3, 0.8], [-0.5, 0.4]], dtype=torch.float64)
    x1 = torch.randn(1, 2, dtype=torch.float64).expand(4000, 2)
    probes = torch.randint(2, (1, 4000, 2), generator=torch.Generator().manual_seed(0)).double() * 2 - 1
    exact, *_ = log_likelihood(lambda x, t, t_next: x @ a.T, x1[:1], "rk4", time_grids.uniform(20))
    estimates, *_ = log_likelihood(lambda x, t, t_next: x @ a.T, x1, "rk4", time_grids.uniform(20), eps=probes)
    assert estimates.std() > 0.1
    assert estimates.mean().item() == pytest.approx(exact.item(), abs=4 * estimates.std().item() / 4000**0.5)


def test_bits_of_a_uniform_density():
    """Uniform over the 256 levels, a density of 127.5 / 256 a dimension, is 8 bits a dimension."""
    log_p = torch.tensor([10 * math.log(127.5 / 256)])
    assert bits_per_dimension(log_p, 10).item() == pytest.approx(8)


def test_a_dequantised_pixel_rounds_to_its_level():
    """The bins of the likelihood are those of sampling."""
    pixels = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16)
    for u in (1e-6, 0.5, 1 - 1e-6):
        assert torch.equal(to_uint8(dequantize(pixels, torch.full((1, 1, 16, 16), u, dtype=torch.float64))), pixels)
    assert torch.allclose(dequantize(pixels, torch.tensor(0.5)), pixels.double() / 127.5 - 1)  # the value that networks learn


def test_bits_of_narrow_data_are_those_of_rounding():
    """Pixels that are rounded from N(127, 1.16^2): the bits come within 0.1 of the entropy, which they bound from above."""
    std, n = 1.16, 20_000
    levels = torch.arange(256, dtype=torch.float64)
    normal = torch.distributions.Normal(torch.tensor(127.0, dtype=torch.float64), std)
    p = normal.cdf(levels + 0.5) - normal.cdf(levels - 0.5)
    entropy = -(p * p.clamp(min=1e-300).log2()).sum().item()
    g = torch.Generator().manual_seed(0)
    pixels = (127 + std * torch.randn(n, 1, dtype=torch.float64, generator=g)).round()
    x1 = dequantize(pixels, torch.rand(n, 1, dtype=torch.float64, generator=g))
    log_p = normal.log_prob((x1[:, 0] + 1) * 127.5) + math.log(127.5)
    assert 0 < bits_per_dimension(log_p, 1).mean().item() - entropy < 0.1


def test_a_gradient_is_refused(data):
    x1 = data[0][:2].clone().requires_grad_()
    with pytest.raises(ValueError, match=r"x1 requires a gradient.*pass x1.detach\(\)"):
        log_likelihood(velocity, x1)
    with torch.no_grad():
        assert log_likelihood(velocity, x1)[0].isfinite().all()


def test_likelihood_depends_on_the_prompt():
    torch.manual_seed(0)
    net = models.build("mini_unet", (1, 8, 8), {"width": 8, "head_channels": 8, "max_prompt_bytes": 4})
    with torch.no_grad():
        for p in net.parameters():  # the last layer begins at 0
            p.add_(0.1 * torch.randn_like(p))
    sampler, x1 = Sampler(FlowModel(net, LinearPath(), (1, 8, 8)), torch.device("cpu")), torch.zeros(1, 1, 8, 8)
    one, other, again = (
        sampler.log_likelihood(x1, prompts=[prompt], hutchinson_samples=1, rtol=0.1, atol=0.1) for prompt in ("a", "b", "a")
    )
    assert one.isfinite() and one != other and one == again
    with pytest.raises(ValueError, match="this network reads prompts"):
        sampler.log_likelihood(x1)


def test_a_method_without_times_is_refused(data):
    with pytest.raises(ValueError, match="method=heun: needs times; use one of dopri5"):
        log_likelihood(velocity, data[0], "heun")
