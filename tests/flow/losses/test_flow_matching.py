"""The loss of flow matching against its formula, and its minimizer."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import loss_at
from torch import Tensor

from flow import losses, time_samplers
from flow.losses import Batch
from flow.losses.flow_matching import FlowMatching
from flow.path import LinearPath

PATH = LinearPath()
GIVEN = {"path": PATH, "prediction": "velocity", "time_sampler": time_samplers.build("uniform")}
LOSS = FlowMatching(**GIVEN)


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


def test_weight_of_a_sample():
    """With p = 1 the gradient of each sample is that of the logarithm of its loss, whatever its size."""
    loss = FlowMatching(**GIVEN, weight_power=1.0, weight_offset=1e-9)
    x0, x1, t = torch.zeros(2, 1), torch.tensor([[3.0], [0.01]]), torch.tensor([0.5, 0.25])
    scale = torch.tensor(0.5, requires_grad=True)
    weighted = loss_at(loss, lambda x, t, y: scale * x, x0, x1, t)
    plain = loss_at(LOSS, lambda x, t, y: scale * x, x0, x1, t).per_sample
    assert torch.equal(weighted.terms["unweighted"], plain)
    for k in range(2):
        (a,) = torch.autograd.grad(weighted.per_sample[k], scale, retain_graph=True)
        (b,) = torch.autograd.grad(plain[k].log(), scale, retain_graph=True)
        assert a.item() == pytest.approx(b.item(), rel=1e-4)


@pytest.mark.parametrize("args", [{"weight_power": -1}, {"weight_offset": 0}])
def test_wrong_weight(args):
    (name,) = args
    with pytest.raises(ValueError, match=f"{name}="):
        FlowMatching(**GIVEN, **args)


def test_loss_is_float32():
    """The loss is float32 for any dtype of the network."""
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


@pytest.mark.parametrize("name", [name for name, loss in losses.LOSSES.items() if loss.capturable])
def test_a_capturable_loss_sees_tensors_alone(name):
    """A CUDA graph would repeat the step and the progress at which it was captured."""
    g = torch.Generator().manual_seed(0)
    x1, x0, u = torch.randn(8, 2, generator=g), torch.randn(8, 2, generator=g), torch.rand(8, 1, generator=g)
    loss = losses.build(name, PATH, "velocity", time_samplers.build("uniform"), {})
    first = Batch(x1, x0, None, u, 0, slice(0, 8), range(8), list(range(8)))
    later = replace(first, step=9, sample_ids=range(72, 80), indices=[0] * 8, progress=0.9)
    values = [loss(lambda x, t, y: x * t[:, None], None, batch).per_sample for batch in (first, later)]
    assert torch.equal(*values)


def test_capturable_is_not_inherited():
    class Other(FlowMatching):
        pass

    assert FlowMatching.capturable and not Other.capturable


def test_names_of_losses_are_not_taken_twice():
    with pytest.raises(TypeError, match=r"the loss 'flow_matching' exists already, in flow\.losses\.flow_matching"):
        type("Copied", (FlowMatching,), {"name": "flow_matching", "__module__": "flow.losses.copied"})
    assert losses.LOSSES["flow_matching"] is FlowMatching


@pytest.mark.parametrize(
    ("name", "args", "expected"),
    [
        ("trajectory", {}, False), ("distillation", {}, False), ("distillation", {"flow_share": 0.4}, True),
        ("flow_matching", {}, True),
    ],
)  # fmt: skip
def test_which_losses_draw_their_times(name, args, expected):
    assert losses.build(name, PATH, "velocity", GIVEN["time_sampler"], args).uses_time_sampler == expected
