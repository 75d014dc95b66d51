"""The losses of flow maps, against flows whose map is known."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

import models
from flow import losses, time_samplers
from flow.losses import Batch
from flow.losses.trajectory import derivative_weights
from flow.path import LinearPath
from flow.training.eager import EagerNetwork

MEANS, STD = (-1.0, 0.8), 0.6  # of the two Gaussians of the data
NUM_BASIS = 4


def build_loss(name: str, **args) -> losses.FlowLoss:
    return losses.build(name, LinearPath(), "velocity", time_samplers.build("uniform"), args)


def cdf(x: Tensor, t: Tensor) -> Tensor:
    """P(x_t <= x) of the path from N(0, 1) to the mixture of both Gaussians."""
    std = ((t * STD) ** 2 + (1 - t) ** 2).sqrt()
    return sum(torch.special.ndtr((x - t * mean) / std) for mean in MEANS) / len(MEANS)


def density(x: Tensor, t: Tensor) -> Tensor:
    std = ((t * STD) ** 2 + (1 - t) ** 2).sqrt()
    return sum(torch.exp(-(((x - t * mean) / std) ** 2) / 2) / (std * 2.5066282746) for mean in MEANS) / len(MEANS)


def true_map(x: Tensor, t: Tensor, t_next: Tensor) -> Tensor:
    """Where the flow leads from x at t: in one dimension it preserves the distribution function. Newton's last step carries
    the derivatives by x and t."""
    level, low, high = cdf(x, t), torch.full_like(x, -9.0).detach(), torch.full_like(x, 9.0).detach()
    for _ in range(30):
        middle = (low + high) / 2
        below = cdf(middle, t_next.detach()) < level.detach()
        low, high = torch.where(below, middle, low), torch.where(below, high, middle)
    root = ((low + high) / 2).detach()
    return root - (cdf(root, t_next) - level) / density(root, t_next.detach()).detach()


def true_velocity(x: Tensor, t: Tensor) -> Tensor:
    """E[x1 - x0 | x_t = x]."""
    variance = (t * STD) ** 2 + (1 - t) ** 2
    weights = torch.stack([-((x - t * mean) ** 2) / (2 * variance) for mean in MEANS]).softmax(0)
    slope = (t * STD**2 - (1 - t)) / variance
    return sum(w * (mean + slope * (x - t * mean)) for w, mean in zip(weights, MEANS, strict=True))


class NearTruth(nn.Module):
    """The true mean velocity plus theta . phi(x, t, t_next): theta = 0 is the truth."""

    two_times, null, num_classes, max_prompt_bytes = True, None, None, None

    def __init__(self, truth: Callable[[Tensor, Tensor, Tensor], Tensor]):
        super().__init__()
        self.theta, self.truth = nn.Parameter(torch.zeros(NUM_BASIS, dtype=torch.float64)), truth

    def forward(self, x: Tensor, t: Tensor, y: Tensor | None = None, t_next: Tensor | None = None) -> Tensor:
        t, t_next = t[:, None].double(), (t if t_next is None else t_next)[:, None].double()
        basis = torch.stack([torch.ones_like(x), x, t * x, (t_next - t) * torch.sin(2 * x)], dim=-1)
        return self.truth(x.double(), t, t_next) + basis @ self.theta


def mean_velocity(x: Tensor, t: Tensor, t_next: Tensor) -> Tensor:
    step = torch.where(t_next > t, t_next - t, 1.0)
    return torch.where(t_next > t, (true_map(x, t, t_next) - x) / step, true_velocity(x, t))


def batch_of(n: int, seed: int = 0, num_uniforms: int = 3, progress: float = 1.0) -> Batch:
    g = torch.Generator().manual_seed(seed)
    mean = torch.tensor(MEANS, dtype=torch.float64)[torch.randint(2, (n, 1), generator=g)]
    x1 = mean + STD * torch.randn(n, 1, generator=g, dtype=torch.float64)
    x0 = torch.randn(n, 1, generator=g, dtype=torch.float64)
    u = time_samplers.stratified(seed, 0, n, num_uniforms)
    return Batch(x1, x0, None, u, 0, slice(0, n), range(n), list(range(n)), progress=progress)


def gradient(loss: losses.FlowLoss, net: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
    """The mean of the gradients of the samples by theta, and its standard error."""
    eager = EagerNetwork(net)
    parts = []
    for rows in torch.arange(len(batch.x1)).split(len(batch.x1) // 20):
        assert batch.x0 is not None and batch.uniforms is not None
        part = replace(batch, x1=batch.x1[rows], x0=batch.x0[rows], uniforms=batch.uniforms[rows])
        net.zero_grad()
        loss(net, eager, part).per_sample.mean().backward()
        parts.append(net.theta.grad.clone())
    grads = torch.stack(parts)
    return grads.mean(0), grads.std(0) / len(parts) ** 0.5


@pytest.mark.parametrize("args", [{"tangent": "path"}, {"tangent": "network"}, {"derivative": "difference"}], ids=str)
def test_true_map_is_stationary_for_mean_flow(args):
    loss = build_loss("mean_flow", map_share=0.8, weight_power=0, **args)
    grad, error = gradient(loss, NearTruth(mean_velocity), batch_of(6_000))
    assert (grad.abs() < 4.5 * error).all()
    grad, error = gradient(loss, NearTruth(lambda x, t, t_next: true_velocity(x, t)), batch_of(6_000))  # no map
    assert (grad.abs() > 8 * error).any()


@pytest.mark.parametrize("derivative", ["jvp", "difference"])
def test_sign_of_the_derivative(derivative):
    """With time running from noise to data the target is v + (s - t) du/dt."""

    class Rising:  # a network whose derivative is 1
        null = None

        def jvp(self, x, t, y, t_next, v, precision):
            return torch.ones_like(x)

        def difference(self, x, t, y, t_next, v):
            return torch.ones_like(x)

    loss, batch = build_loss("mean_flow", map_share=1.0, weight_power=0, derivative=derivative), batch_of(100)
    t, t_next = loss.times(batch.uniforms, batch.progress)
    result = loss(lambda x, t, y, t_next: torch.zeros_like(x), Rising(), batch)
    expected = (batch.x1 - batch.x0)[:, 0] + (t_next - t)
    assert torch.allclose(result.per_sample, expected.square(), rtol=1e-5)


def test_alpha_flow_goes_to_mean_flow():
    """With the same samples the difference of the gradients falls in proportion to alpha."""
    net, batch = NearTruth(mean_velocity), batch_of(4_000)
    expected, _ = gradient(build_loss("mean_flow", map_share=1.0, weight_power=0), net, batch)
    alphas = [0.08, 0.04, 0.02]
    errors = [
        (gradient(build_loss("alpha_flow", map_share=1.0, weight_power=0, alpha_min=a), net, batch)[0] - expected).norm().item()
        for a in alphas
    ]
    assert errors[0] / errors[1] == pytest.approx(2, abs=0.3) and errors[1] / errors[2] == pytest.approx(2, abs=0.3)


def test_weight_keeps_maps_at_the_smallest_alpha():
    """Their error shrinks with alpha; an offset above it would take the maps out of the training."""
    net, batch = NearTruth(lambda x, t, t_next: true_velocity(x, t)), batch_of(4_000)
    wanted, reached = (
        gradient(build_loss(name, map_share=1.0, weight_power=0.5), net, batch)[0].norm().item()
        for name in ("mean_flow", "alpha_flow")
    )
    assert 0.8 < reached / wanted < 1.25, (reached, wanted)


def tiny_net(two_times: bool = True) -> nn.Module:
    torch.manual_seed(0)
    net = models.build("mlp", (1, 1, 1), {"width": 16, "depth": 2, "two_times": two_times, "time_frequency": 6.0})
    for p in net.parameters():
        nn.init.normal_(p, std=0.3)
    return net


def image_batch(n: int = 64, **changes) -> Batch:
    batch = batch_of(n)
    x1, x0 = (x.float().view(-1, 1, 1, 1) for x in (batch.x1, batch.x0))
    return replace(batch, x1=x1, x0=x0, **changes)


def test_alpha_one_is_flow_matching_over_two_times():
    loss, net, batch = build_loss("alpha_flow", map_share=1.0, weight_power=0), tiny_net(), image_batch(progress=0.0)
    t, t_next = loss.times(batch.uniforms, batch.progress)
    column = t.view(-1, 1, 1, 1)
    prediction = net(column * batch.x1 + (1 - column) * batch.x0, t, None, t_next)
    expected = (prediction - (batch.x1 - batch.x0)).square().flatten(1).mean(1)
    assert torch.allclose(loss(net, EagerNetwork(net), batch).per_sample, expected, rtol=1e-5)


def test_shortcut_model_is_alpha_one_half():
    """With the network's own half step in place of x1 - x0, the target is that of two half steps (arXiv:2410.12557, eq. 4)."""
    loss, net = build_loss("alpha_flow", map_share=1.0, weight_power=0, alpha_min=0.5), tiny_net()
    eager, batch = EagerNetwork(net), image_batch(progress=1.0)
    t, t_next = loss.times(batch.uniforms, batch.progress)
    column, half = t.view(-1, 1, 1, 1), (t_next - t).view(-1, 1, 1, 1) / 2
    x = column * batch.x1 + (1 - column) * batch.x0
    middle = (t + t_next) / 2
    first = eager(x, t, None, middle)
    second = eager(x + half * first, middle, None, t_next)
    own = image_batch(progress=1.0)
    own.x1, own.x0 = x + (1 - column) * first, x - column * first  # the pair through x whose velocity is `first`
    expected = 2 * (net(x, t, None, t_next) - (first + second) / 2).square().flatten(1).mean(1)
    assert torch.allclose(loss(net, eager, own).per_sample, expected, rtol=1e-4)


def test_alpha_falls_along_a_sigmoid():
    loss = build_loss("alpha_flow", anneal_start=0.2, anneal_end=0.6)
    alphas = [loss.alpha(progress) for progress in (0.0, 0.2, 0.35, 0.4, 0.45, 0.6, 1.0)]
    assert alphas[:2] == [1, 1] and alphas[-2:] == [0.005, 0.005] and alphas[3] == pytest.approx(0.5)
    assert alphas == sorted(alphas, reverse=True) and alphas[2] == pytest.approx(1 - alphas[4])


def path_batch(n: int, count: int = 8) -> Batch:
    """Pairs of the true flow, with `count` states between them."""
    batch = batch_of(n, num_uniforms=2)
    times = tuple((k + 1) / (count + 1) for k in range(count))
    start = torch.zeros(n, 1, dtype=torch.float64)
    batch.states = torch.stack([true_map(batch.x0, start, start + t) for t in times], dim=1).float()
    batch.x1, batch.x0, batch.state_times = true_map(batch.x0, start, start + 1).float(), batch.x0.float(), times
    return batch


def test_true_map_is_stationary_for_trajectory():
    net, batch = NearTruth(mean_velocity), path_batch(4_000)
    maps = build_loss("trajectory", map_share=1.0)(net, EagerNetwork(net), batch).terms["mse"]
    assert maps.max() < 1e-8
    velocities = build_loss("trajectory", map_share=0.0)(net, EagerNetwork(net), batch).terms["mse"]
    assert velocities.mean() ** 0.5 < 0.05  # of a velocity of about 1.6: the polynomial through five states


def fresh_batch(step: int, steps: int) -> Batch:
    batch = batch_of(4096, seed=step, progress=step / steps)
    return replace(batch, x1=batch.x1.float(), x0=batch.x0.float())


def batches_of_paths(n: int = 20_000) -> Callable[[int, int], Batch]:
    stored = path_batch(n)

    def batch(step: int, steps: int) -> Batch:
        rows = torch.randint(n, (4096,), generator=torch.Generator().manual_seed(step))
        u = time_samplers.stratified(0, step, 4096, 2)
        return replace(stored, x1=stored.x1[rows], x0=stored.x0[rows], states=stored.states[rows], uniforms=u)

    return batch


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "args", "batch_at", "steps"),
    [
        ("mean_flow", {"map_share": 0.5, "tangent": "network"}, lambda: fresh_batch, 4_000),
        ("alpha_flow", {"map_share": 0.5, "anneal_end": 0.5, "alpha_min": 0.002}, lambda: fresh_batch, 5_000),
        ("trajectory", {}, batches_of_paths, 2_000),
    ],
    ids=["mean_flow", "alpha_flow", "trajectory"],
)
def test_training_reaches_the_true_map(name, args, batch_at, steps):
    """One step ends within 2% of the standard deviation of the data. Smooth time features and large batches are needed."""
    torch.manual_seed(0)
    loss, batch = build_loss(name, weight_power=0, **args), batch_at()
    net = models.build("mlp", (1,), {"width": 64, "depth": 3, "two_times": True, "time_frequency": 4.0})
    eager, optimizer = EagerNetwork(net), torch.optim.Adam(net.parameters(), lr=2e-3, betas=(0.9, 0.99))
    warm_up = torch.optim.lr_scheduler.LinearLR(optimizer, 0.01, 1.0, 100)
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for step in range(steps):
        optimizer.zero_grad()
        loss(net, eager, batch(step, steps)).per_sample.mean().backward()
        nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        warm_up.step()
        decay.step()
    x = torch.randn(20_000, 1, generator=torch.Generator().manual_seed(7))
    t = torch.zeros(len(x))
    with torch.no_grad():
        reached = (x + net(x, t, None, t + 1)).double()
    start = t[:, None].double()
    error = (reached - true_map(x.double(), start, start + 1)).square().mean().sqrt()
    data_std = (STD**2 + ((MEANS[1] - MEANS[0]) / 2) ** 2) ** 0.5
    assert error < 0.02 * data_std, f"{error / data_std:.2%}"


def test_derivative_weights():
    times = torch.tensor([0.0, 0.1, 0.25, 0.5, 0.6, 0.8, 1.0], dtype=torch.float64)
    weights = derivative_weights(times)
    for power in range(5):
        assert torch.allclose(weights @ times**power, power * times ** max(power - 1, 0), atol=1e-10)
    assert not torch.allclose(weights @ times**5, 5 * times**4, atol=1e-4)
    assert torch.allclose(derivative_weights(times[:2]) @ times[:2], torch.ones(2, dtype=torch.float64))


def test_guidance_inside():
    """w v + (1 - w) u_null without a mix; a mix moves part of v to the network; dropped labels keep v. What has the factor 0
    is not computed."""
    torch.manual_seed(0)
    net = models.build("mlp", (1, 1, 1), {"width": 16, "depth": 1, "num_classes": 2, "two_times": True})
    for p in net.parameters():
        nn.init.normal_(p, std=0.3)
    eager, g = EagerNetwork(net), torch.Generator().manual_seed(0)
    x, v = (torch.randn(6, 1, 1, 1, generator=g) for _ in range(2))
    t, y = torch.rand(6, generator=g), torch.tensor([0, 1, 2, 0, 1, 2])
    null, own = eager(x, t, torch.full_like(y, 2), t), eager(x, t, y, t)
    dropped, calls = (y == 2).view(-1, 1, 1, 1), []
    net.register_forward_hook(lambda *_: calls.append(1))
    for scale, mix, passes, expected in [
        (3.0, 0.0, 1, 3 * v - 2 * null),
        (3.0, 0.5, 2, 1.5 * v + 0.5 * own - null),
        (1.0, 0.5, 1, 0.5 * v + 0.5 * own),
    ]:
        loss = build_loss("mean_flow", guidance_scale=scale, guidance_mix=mix)
        assert torch.allclose(loss.guided(eager, x, t, y, v), torch.where(dropped, v, expected))
        assert len(calls) == loss.guidance_passes == passes
        calls.clear()
    assert build_loss("mean_flow").guided(eager, x, t, y, v) is v and not calls


@pytest.mark.parametrize("name", ["mean_flow", "alpha_flow"])
def test_share_and_weight(name):
    loss, net, batch = build_loss(name, map_share=0.25), tiny_net(), image_batch(n=400, progress=1.0)
    t, t_next = loss.times(batch.uniforms, batch.progress)
    assert (t <= t_next).all() and (t < t_next).sum() == 100
    result = loss(net, EagerNetwork(net), batch)
    mse, alpha = result.terms["mse"], torch.where(t_next > t, getattr(loss, "alpha_min", 1.0), 1.0)
    assert torch.allclose(result.per_sample, (alpha * mse / (mse + 1e-6)))


@pytest.mark.parametrize("name", ["mean_flow", "alpha_flow", "trajectory"])
def test_velocity_comes_before_the_map(name):
    """Until map_start all samples have one time; then their share is map_share."""
    loss = build_loss(name, map_share=0.25, map_start=0.6)
    u = time_samplers.stratified(0, 0, 400, 1)[:, 0]
    assert [loss.have_two_times(u, progress).sum().item() for progress in (0.0, 0.59, 0.6, 1.0)] == [0, 0, 100, 100]
    assert loss.mean_map_share == pytest.approx(0.1)
    batch = path_batch(400) if name == "trajectory" else batch_of(400)
    seen = []
    for progress in (0.0, 0.6):
        net = lambda x, t, y, t_next: seen.append((t_next > t).sum().item()) or x * 0  # noqa: E731
        loss(net, EagerNetwork(NearTruth(mean_velocity)), replace(batch, progress=progress))
    assert seen == [0, 100]


def test_no_is_a_precision():
    assert build_loss("mean_flow", jvp_precision=False).jvp_precision == "no"  # what YAML makes of no


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ({"map_share": 1.5}, "map_share=1.5: must be between 0 and 1"),
        ({"map_start": 1}, "map_start=1: must be 0 or more and less than 1"),
        ({"guidance_scale": float("inf")}, "guidance_scale=inf: must be a finite number"),
        ({"weight_power": -1}, "weight_power=-1: must be 0 or more"),
        ({"guidance_mix": 1}, "guidance_mix=1: must be 0 or more and less than 1"),
        ({"tangent": "x"}, "tangent='x': must be one of path, network"),
        ({"jvp_precision": "fp16"}, "jvp_precision='fp16': must be one of no, bf16"),
        ({"derivative": "x"}, "derivative='x': must be one of jvp, difference"),
        ({"derivative": "difference", "jvp_precision": "bf16"}, "jvp_precision='bf16': must be no with derivative=difference"),
        ({"alpha_min": 0.1}, "mean_flow has no argument 'alpha_min'"),
    ],
)
def test_arguments(args, message):
    with pytest.raises(ValueError, match=message):
        build_loss("mean_flow", **args)
    with pytest.raises(ValueError, match=r"alpha_flow: a flow map needs flow.path=linear"):
        losses.build("alpha_flow", LinearPath(), "data", time_samplers.build("uniform"), {})
