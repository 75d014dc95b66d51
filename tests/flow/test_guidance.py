"""Labels that are dropped, and guidance against its formula."""

import pytest
import torch
from torch import Tensor

from flow.guidance import GuidedVelocity, drop_labels, network_calls
from flow.solvers import solve


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
    assert network_calls(scale) == forwards


def test_without_labels_there_is_nothing_to_guide():
    net = Net()
    velocity = GuidedVelocity(net)
    x = torch.randn(4, 3)
    assert torch.equal(velocity(x, 0.5), torch.sin(x + 0.5)) and velocity.forwards == 1


@pytest.mark.parametrize(("t", "guided"), [(0.1, False), (0.25, True), (0.4, True), (0.5, True), (0.75, False)])
def test_interval_of_each_stage(t, guided):
    x, y = torch.randn(4, 3), torch.tensor([0, 1, 2, 1])
    velocity = GuidedVelocity(Net(), y, 5, 3.0, interval=(0.25, 0.5))
    assert torch.equal(velocity(x, t), GuidedVelocity(Net(), y, 5, 3.0 if guided else 1.0)(x, t))
    assert velocity.forwards == 1 + guided


def test_interval_of_a_solver():
    velocity = GuidedVelocity(Net(), torch.tensor([1, 2]), 5, 2.0, interval=(0.5, 1.0))
    solution = solve(velocity, torch.randn(2, 3), [0.0, 0.4, 0.8, 1.0], "midpoint")  # stages at 0, 0.2, 0.4, 0.6, 0.8, 0.9
    assert solution.nfe == 6 and velocity.forwards == 3 + 2 * 3


@pytest.mark.parametrize("interval", [(0.0, 1.0), (0.0, 0.3)])
def test_autoguidance_is_the_formula(interval):
    x, y, guide_net = torch.randn(4, 3), torch.tensor([0, 1, 2, 1]), Net()
    guide = GuidedVelocity(lambda x, t, y: 0.5 * guide_net(x, t, y), y, 5)
    velocity = GuidedVelocity(Net(), y, 5, 2.5, interval, guide)
    strong, weak = Net()(x, torch.full((4,), 0.4), y), 0.5 * Net()(x, torch.full((4,), 0.4), y)
    on = interval[1] >= 0.4
    torch.testing.assert_close(velocity(x, 0.4), weak + 2.5 * (strong - weak) if on else strong)
    assert velocity.forwards == 1 + on and len(guide_net.calls) == on
