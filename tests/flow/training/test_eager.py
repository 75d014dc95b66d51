"""The eager network that losses take targets from: derivatives, dropout, precision."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from small_networks import SMALL, build, inputs
from torch.nn.attention import SDPBackend, sdpa_kernel

from configs.errors import UserError
from flow.training.eager import EagerNetwork


@pytest.mark.parametrize(
    ("name", "args"),
    [
        *((name, {}) for name in SMALL),
        ("dit", {"qk_norm": True, "cross_attention": True, "positions": "sine"}),
        ("unet", {"scale_shift_norm": False, "resblock_updown": False, "middle_attention": True}),
        ("mini_unet", {"data_std": 0.5}),
        ("mini_unet", {"num_classes": None, "max_prompt_bytes": 4}),
    ],
)
def test_eager_derivative(name, args):
    """The jvp along (v, 1) is that of central differences, and carries no gradient."""
    net = build(name, two_times=True, **args).double()
    x, t, y = inputs()
    if "max_prompt_bytes" in args:
        y = net.encode(["a", "seven"[:4], "", "b c"])
    x, t = x.double(), t.double() * 0.5
    v, t_next, h = torch.randn_like(x), t + 0.3, 1e-7
    eager = EagerNetwork(net)
    du = eager.jvp(x, t, y, t_next, v)
    expected = (net(x + h * v, t + h, y, t_next) - net(x - h * v, t - h, y, t_next)) / (2 * h)
    assert torch.allclose(du, expected, rtol=1e-4, atol=1e-4) and not du.requires_grad
    sharded = EagerNetwork(net, "no derivatives of sharded networks")
    for derivative in (sharded.jvp, sharded.difference):
        with pytest.raises(UserError, match="sharded"):
            derivative(x, t, y, t_next, v)


@pytest.mark.parametrize("frequency", [10.0, 1000.0])
@pytest.mark.parametrize("name", SMALL)
def test_differences_are_close_to_the_derivative(name, frequency):
    """In float32, with the masks of dropout, also of networks whose time features are fast."""
    net = build(name, two_times=True, time_frequency=frequency, **({} if name == "mlp" else {"dropout": 0.3})).train()
    x, t, y = inputs()
    v, t_next = torch.randn_like(x), t * 0.5 + 0.5
    eager = EagerNetwork(net)
    expected, difference = eager.jvp(x, t, y, t_next, v), eager.difference(x, t, y, t_next, v)
    assert (difference - expected).norm() < 0.02 * expected.norm() and not difference.requires_grad


def test_float32_is_not_rounded_to_tf32():
    """A GPU rounds convolutions by default; targets in the precision of the training are rounded as the training is."""
    allowed = []

    class Recording(torch.nn.Linear):
        def forward(self, x, t, y=None, t_next=None):
            allowed.append(torch.backends.cudnn.allow_tf32)
            return super().forward(x)

    eager, x, t = EagerNetwork(Recording(8, 8)), torch.ones(2, 8), torch.zeros(2)
    before = torch.backends.cudnn.allow_tf32
    eager(x, t), eager.jvp(x, t, None, t, x), eager.difference(x, t, None, t, x), eager.as_trained(x, t)
    assert allowed == [False] * 4 + [before] and torch.backends.cudnn.allow_tf32 == before


def test_a_kernel_without_forward_mode():
    """The error of a network that insists on fused attention names the loss which needs no derivative."""

    class Fused(torch.nn.Linear):
        def forward(self, x, t, y=None, t_next=None):
            q = super().forward(x)[:, None]
            with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
                return F.scaled_dot_product_attention(q, q, q)[:, 0]

    eager, x, t = EagerNetwork(Fused(8, 8)), torch.ones(2, 4, 8), torch.zeros(2)
    assert torch.isfinite(eager(x, t)).all()
    with pytest.raises(UserError, match=r"no forward-mode derivative .*; use loss\.args\.derivative=difference or"):
        eager.jvp(x, t, None, t, x)
    assert torch.isfinite(eager.difference(x, t, None, t, x)).all()


def test_an_operation_that_torch_takes_for_a_constant():
    """torch.func.jvp has no derivative of a custom operation, and does not say so."""

    @torch.library.custom_op("test_flow_maps::sine", mutates_args=())
    def sine(x: torch.Tensor) -> torch.Tensor:
        return torch.sin(x)

    class Custom(torch.nn.Linear):
        def forward(self, x, t, y=None, t_next=None):
            return sine(super().forward(x) + t[:, None])

    eager, x, t = EagerNetwork(Custom(8, 8)), torch.ones(2, 8), torch.zeros(2)
    with pytest.raises(UserError, match=r"test_flow_maps\.sine\.default has none; use loss\.args\.derivative=difference"):
        eager.jvp(x, t, None, t, x)


def test_eager_replays_dropout():
    """Before and after the training pass, whose masks it must not change."""
    net = build("unet", dropout=0.5).train()
    x, t, y = inputs()
    eager = EagerNetwork(net)
    before, trained, after = eager(x, t, y), net(x, t, y), eager(x, t, y)
    assert torch.equal(before, trained) and torch.equal(after, trained) and not before.requires_grad
    eager.start_micro_batch()
    assert not torch.equal(eager(x, t, y), trained)


def test_eager_replays_dropout_of_mps(monkeypatch):
    """Devices other than the CPU have a random state of their own; here a generator stands in for that of mps."""
    state = torch.Generator().manual_seed(0)
    monkeypatch.setattr(torch.mps, "get_rng_state", lambda device: state.get_state())
    monkeypatch.setattr(torch.mps, "set_rng_state", lambda new_state, device: state.set_state(new_state))

    class Masked(torch.nn.Module):
        def parameters(self, recurse=True):
            yield SimpleNamespace(device=torch.device("mps"))

        def forward(self, x, t, y=None, t_next=None):
            return x * torch.bernoulli(torch.full_like(x, 0.5), generator=state)

    net, (x, t, _) = Masked(), inputs()
    eager = EagerNetwork(net)
    before, trained, after = eager(x, t), net(x, t), eager(x, t)
    assert torch.equal(before, trained) and torch.equal(after, trained)
    eager.start_micro_batch()
    assert not torch.equal(eager(x, t), trained)


def test_eager_is_not_autocast():
    """Accelerate patches forward on the network itself under mixed precision."""
    net, (x, t, y) = build("mini_unet"), inputs()
    expected = net(x, t, y)
    accelerator = Accelerator(cpu=True, mixed_precision="bf16")
    prepared = accelerator.prepare(net)
    rounded = prepared(x, t, y).float()
    assert not torch.allclose(rounded, expected, atol=1e-6)
    eager = EagerNetwork(net)
    assert torch.allclose(eager(x, t, y), expected, atol=1e-6)
    assert torch.equal(eager.as_trained(x, t, y), rounded) and not eager.as_trained(x, t, y).requires_grad
