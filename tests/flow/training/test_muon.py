"""Muon for hidden matrices, AdamW for the rest, as one optimizer."""

import copy

import pytest
import torch
from accelerate import Accelerator
from torch import nn

import models
from configs.schema import OptimizerConfig
from flow.training.muon import MuonWithAdamW, orthogonalize
from flow.training.optimizer import build_optimizer, set_options

OPTIONS = {"betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.01}


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 32, 3), nn.Conv2d(32, 64, 3), nn.GroupNorm(4, 64), nn.Conv2d(64, 3, 3))


def optimizer_of(net: nn.Module) -> MuonWithAdamW:
    return MuonWithAdamW(net, lr=1e-2, fused=False, dtype=torch.float32, **OPTIONS)


def train(net: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        x = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        net(x).square().mean().backward()
        optimizer.step()


def test_hidden_matrix_by_torch():
    net, options = network(), {"lr": 1e-2, "weight_decay": 0.01}
    reference = copy.deepcopy(net)
    matrix = nn.Parameter(reference[1].weight.detach().reshape(64, 32 * 9).clone())
    others = [p for p in reference.parameters() if p is not reference[1].weight]
    muon = torch.optim.Muon([matrix], adjust_lr_fn="match_rms_adamw", **options)
    adamw = torch.optim.AdamW(others, lr=1e-2, **OPTIONS)
    optimizer = optimizer_of(net)
    for step in range(3):
        train(net, optimizer, range(step, step + 1))
        reference[1].weight.data.copy_(matrix.detach().view(64, 32, 3, 3))
        reference.zero_grad()
        reference(torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(step))).square().mean().backward()
        matrix.grad = reference[1].weight.grad.reshape(64, -1)
        muon.step()
        adamw.step()
    trained, start = net[1].weight.detach().reshape(64, -1), network()[1].weight.detach().reshape(64, -1)
    # torch.optim.Muon computes in bfloat16, this one in what the machine is fast in
    assert (trained - matrix.detach()).norm() < 0.06 * (trained - start).norm()
    for name in ("0.weight", "2.bias"):  # of AdamW, whose gradients come through the matrix
        torch.testing.assert_close(net.get_parameter(name), reference.get_parameter(name), atol=1e-3, rtol=0)


def test_summary_counts_the_parameters_of_both():
    assert "(18,432 parameters), AdamW the other 2,819" in optimizer_of(network()).summary()


def test_weight_decay():
    """Without gradients nothing else moves: w becomes w (1 - lr decay), of both."""
    net = network()
    start = copy.deepcopy(net)
    optimizer = MuonWithAdamW(net, lr=0.1, fused=False, dtype=torch.float32, **{**OPTIONS, "weight_decay": 0.5})
    for p in net.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    for (name, p), before in zip(net.named_parameters(), start.parameters(), strict=True):
        torch.testing.assert_close(p, before * 0.95, msg=name)


@pytest.mark.parametrize("shape", [(3, 32, 64), (2, 64, 32)])
def test_orthogonal(shape):
    values = torch.linalg.svdvals(orthogonalize(torch.randn(shape, generator=torch.Generator().manual_seed(0))))
    assert values.min() > 0.6 and values.max() < 1.25


def test_step_has_the_size_of_adamw():
    net = network()
    before = net[1].weight.detach().clone()
    train(net, MuonWithAdamW(net, lr=1e-2, fused=False, dtype=torch.float32, **{**OPTIONS, "weight_decay": 0.0}), range(1))
    step = (net[1].weight.detach() - before).square().mean().sqrt().item()
    assert step == pytest.approx(0.2 * 1e-2, rel=0.3)


def test_channels_last():
    plain, last = network(), network().to(memory_format=torch.channels_last)
    train(plain, optimizer_of(plain), range(3))
    train(last, optimizer_of(last), range(3))
    assert not last[1].weight.is_contiguous()
    # bfloat16 sums over the columns in another order
    assert (plain[1].weight - last[1].weight).abs().max() < 0.1 * 3e-2 * 0.2


@pytest.mark.parametrize("name", ["adamw", "muon"])
@pytest.mark.parametrize("to_channels_last", [False, True])
def test_resumes_in_another_memory_format(to_channels_last, name):
    """A step after resuming is the step that would have come, up to the order of sums, which Muon takes in bfloat16. AdamW
    is fused, as the Trainer's: it goes through the memory of weights and state without a look at their format."""
    formats = [torch.contiguous_format, torch.channels_last]
    before, after = formats if to_channels_last else formats[::-1]
    config, accelerator = OptimizerConfig(name=name, lr=1e-2), Accelerator(cpu=True)
    net = network().to(memory_format=before)
    optimizer = build_optimizer(net, config, accelerator)
    train(net, optimizer, range(3))
    start, other = copy.deepcopy(net), copy.deepcopy(net).to(memory_format=after)
    resumed = build_optimizer(other, config, accelerator)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    set_options(resumed, config, accelerator)
    train(net, optimizer, range(3, 4))
    train(other, resumed, range(3, 4))
    assert net[0].weight.stride() != other[0].weight.stride()
    for key, weight in start.named_parameters():
        step, resumed_step = (trained.get_parameter(key).detach() - weight.detach() for trained in (net, other))
        of_muon = name == "muon" and key == "1.weight"
        assert (resumed_step - step).norm() < (0.05 if of_muon else 0.01) * step.norm(), key


def test_no_gradient_outlives_zero_grad():
    """Neither that of a parameter nor that of the view of it which Muon works on."""
    net = network().to(memory_format=torch.channels_last)
    optimizer = optimizer_of(net)
    train(net, optimizer, range(1))
    optimizer.zero_grad()
    assert optimizer.views and all(p.grad is None for p in (*net.parameters(), *optimizer.views))


def test_resumes_to_the_same_bits():
    straight, resumed = network(), network()
    train(straight, optimizer_of(straight), range(6))
    first = optimizer_of(resumed)
    train(resumed, first, range(3))
    second = optimizer_of(resumed)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    train(resumed, second, range(3, 6))
    assert all(torch.equal(a, b) for a, b in zip(straight.parameters(), resumed.parameters(), strict=True))


@pytest.mark.parametrize("name", ["unet", "mini_unet", "dit"])
def test_pixels_and_embeddings_stay_with_adamw(name):
    args = {
        "unet": {"width": 32, "head_channels": 32},
        "mini_unet": {"width": 32},
        "dit": {"width": 64, "depth": 1, "heads": 2},
    }[name]
    net = models.build(name, (1, 16, 16), {**args, "num_classes": 10})
    optimizer = optimizer_of(net)
    for p in optimizer.matrices:
        assert p.dim() in (2, 4) and min(p.shape[:2]) >= 32
    embeddings = [m.weight for m in net.modules() if isinstance(m, nn.Embedding)]
    assert embeddings and not {id(p) for p in embeddings} & {id(p) for p in optimizer.matrices}
    modulations = [m.weight for name, m in net.named_modules() if name.endswith("modulation")]
    assert modulations and not {id(p) for p in modulations} & {id(p) for p in optimizer.matrices}
    assert sum(p.numel() for p in optimizer.matrices) > 0.5 * sum(p.numel() for p in net.parameters())


@pytest.mark.parametrize("wrapped", [{}, {"data_std": 0.5}])
@pytest.mark.parametrize(
    ("name", "args", "outer"),
    [
        ("unet", {"width": 32, "head_channels": 32, "patch": 4, "attention_resolutions": []}, {"conv_in", "conv_out"}),
        ("mini_unet", {"width": 32, "patch": 4}, {"conv_in", "conv_out"}),
        ("dit", {"width": 64, "depth": 1, "heads": 2, "patch": 4}, {"embed", "unembed"}),
        ("mlp", {"width": 32, "depth": 3}, {"layers.0", "last"}),
    ],
)
def test_layers_of_large_patches_are_of_adamw(name, args, outer, wrapped):
    """Here they have 48 channels or more, as a hidden layer has; a wrapped network has longer names."""
    net = models.build(name, (3, 32, 32), {**args, **wrapped})
    of_muon = {id(p) for p in optimizer_of(net).matrices}
    prefix = "net." if wrapped else ""
    weights = [net.get_submodule(prefix + layer).weight for layer in outer]
    assert all(min(p.shape[:2]) >= 32 and id(p) not in of_muon for p in weights)


def test_nothing_for_muon():
    with pytest.raises(ValueError, match="name=muon: the network has no hidden layer with 32 inputs and outputs; use adamw"):
        optimizer_of(nn.Linear(2, 2))
