"""Degradations and their adjoints; PnP-Flow on a flow whose velocity and posterior are known."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from flow import restoration
from flow.evaluation.restoration import FLOW, Scores, baselines, markdown, mean_and_interval, score
from flow.noise import gaussian_noise, generator
from flow.restoration import Downsampling, GaussianBlur, Grayscale, Inpainting, RestorationSettings
from flow.sampling.images import to_uint8

SHAPE = (3, 8, 12)
DEGRADATIONS = {
    "box": Inpainting(restoration.box_mask(8, 12, 4)),
    "random": Inpainting(restoration.random_masks(8, 12, 0.7, 0, range(5))),
    "downsampling": Downsampling(4),
    "blur": GaussianBlur(1.5),
    "wide blur": GaussianBlur(9.0),
    "gray": Grayscale(),
}
PRIOR_MEAN = torch.tensor([0.4, -0.2, 0.1, 0.6], dtype=torch.float64)  # of images 1x2x2
FACTOR = torch.from_numpy(generator("test prior", 0).standard_normal((4, 4)))
PRIOR_COVARIANCE = FACTOR @ FACTOR.T / 4 + 0.3 * torch.eye(4, dtype=torch.float64)


def gaussian_velocity(x: Tensor, t: float) -> Tensor:
    """v(x, t) = (E[x1 | x_t = x] - x) / (1 - t) of the flow to N(PRIOR_MEAN, PRIOR_COVARIANCE)."""
    variance = t**2 * PRIOR_COVARIANCE + (1 - t) ** 2 * torch.eye(4)
    gain = t * PRIOR_COVARIANCE @ torch.linalg.inv(variance)
    flat = x.flatten(1)
    return ((PRIOR_MEAN + (flat - t * PRIOR_MEAN) @ gain.T - flat) / (1 - t)).view_as(x)


def noise(step: int, draw: int) -> Tensor:
    return gaussian_noise(f"test {step} {draw}", 0, range(2), (1, 2, 2))


EPS = noise(0, 0)  # enough for draws of opposite signs and a velocity that is affine in x: it cancels


def posterior_mean(y: Tensor, a: Tensor, noise_std: float) -> Tensor:
    """E[x | y = A x + noise] [B, 4] of y [B, m] and A [m, 4]."""
    gain = PRIOR_COVARIANCE @ a.T @ torch.linalg.inv(a @ PRIOR_COVARIANCE @ a.T + noise_std**2 * torch.eye(len(a)))
    return PRIOR_MEAN + (y - PRIOR_MEAN @ a.T) @ gain.T


def test_blur_of_other_sizes_and_gradients():
    """A blur that has seen one size and precision, without gradients, is right for others."""
    used = GaussianBlur(1.5)
    with torch.inference_mode():
        used(torch.randn(1, 1, 8, 12))
    for shape, dtype in (((8, 12), torch.float32), ((8, 12), torch.float64), ((12, 8), torch.float32)):
        x = torch.randn(2, 3, *shape, dtype=dtype, requires_grad=True)
        assert torch.equal(used(x), GaussianBlur(1.5)(x)) and used(x).dtype == dtype
        used(x).sum().backward()
        torch.testing.assert_close(x.grad, torch.ones_like(x))  # the kernel has sum 1
    assert used == GaussianBlur(1.5) and used != GaussianBlur(2.0)


@pytest.mark.parametrize("name", DEGRADATIONS)
def test_adjoint(name):
    """<A x, y> = <x, A^T y>, and no x grows by more than |A|."""
    degradation = DEGRADATIONS[name]
    x = gaussian_noise("test x", 0, range(5), SHAPE).double()
    y = gaussian_noise("test y", 0, range(5), tuple(degradation(x).shape[1:])).double()
    torch.testing.assert_close((degradation(x) * y).sum(), (x * degradation.adjoint(y)).sum())
    largest = x
    for _ in range(50):
        largest = degradation.adjoint(degradation(largest / largest.norm()))
    torch.testing.assert_close(largest.norm().item(), degradation.squared_norm, rtol=1e-3, atol=0)
    assert degradation.to_image(y).shape == x.shape


@pytest.mark.parametrize("data_steps, bound", [(1, 1e-7), (4, 5e-3)])
def test_posterior_mean_of_noisy_measurement(data_steps, bound):
    """The result goes to the posterior mean of a Gaussian as the steps grow."""
    a, degradation, std = torch.full((1, 4), 0.25, dtype=torch.float64), Downsampling(2), 0.4
    y = torch.tensor([1.3, -0.8], dtype=torch.float64).view(2, 1, 1, 1)
    target = posterior_mean(y.flatten(1), a, std)
    errors = []
    for steps in (50, 2000):
        settings = RestorationSettings(steps, data_steps=data_steps)
        x = restoration.restore(gaussian_velocity, y, degradation, lambda step, draw: EPS, settings, std)
        errors.append((x.flatten(1) - target).abs().max().item())
    assert errors[1] < bound and errors[1] < 0.1 * errors[0]


@pytest.mark.parametrize("step_size", [1.0, 1.9])
def test_posterior_mean_of_missing_pixels(step_size):
    """Without noise, missing pixels get their mean given the known ones, and these are kept."""
    known = torch.tensor([1.0, 0, 0, 1], dtype=torch.float64).view(1, 1, 2, 2)
    original = gaussian_noise("test original", 0, range(2), (1, 2, 2)).double()
    y = original * known
    settings = RestorationSettings(1000, 2, step_size)
    x = restoration.restore(gaussian_velocity, y, Inpainting(known), lambda step, draw: EPS, settings)
    torch.testing.assert_close(x * known, y)
    a = torch.eye(4, dtype=torch.float64)[known.flatten() > 0]
    torch.testing.assert_close(x.flatten(1), posterior_mean(original.flatten(1) @ a.T, a, 0.0), atol=0.03, rtol=0)


def test_result_fits_exact_measurement():
    y = torch.tensor([0.5, -0.5], dtype=torch.float64).view(2, 1, 1, 1)
    x = restoration.restore(gaussian_velocity, y, Downsampling(2), noise, RestorationSettings(3, 1))
    torch.testing.assert_close(Downsampling(2)(x), y)


def test_result_is_a_function_of_the_noise():
    """Twice the same is the same; other draws of a single noise give something else."""
    y = torch.tensor([0.5, -0.5], dtype=torch.float64).view(2, 1, 1, 1)
    settings = RestorationSettings(5, 1)
    first, again, other = (
        restoration.restore(gaussian_velocity, y, Downsampling(2), draws, settings)
        for draws in (noise, noise, lambda step, draw: noise(step + 1, draw))
    )
    torch.testing.assert_close(first, again, rtol=0, atol=0)
    assert (first - other).abs().max() > 0.01


def test_masks_and_noise_are_functions_of_the_image():
    """Image 3 has the same mask and noise alone and among others."""
    masks = restoration.random_masks(6, 5, 0.5, 7, range(5))
    torch.testing.assert_close(masks[3:4], restoration.random_masks(6, 5, 0.5, 7, range(3, 4)))
    assert masks.flatten(1).sum(1).tolist() == [15] * 5 and not masks[0].equal(masks[1])
    x = torch.zeros(5, 1, 6, 6)
    y = restoration.measure(x, Downsampling(2), 0.1, 7, range(5))
    torch.testing.assert_close(y[3:4], restoration.measure(x[:1], Downsampling(2), 0.1, 7, range(3, 4)))
    assert 0.05 < y.std() < 0.15


@pytest.mark.parametrize("values", [{"steps": 0}, {"draws": 0}, {"data_steps": 0}, {"step_size": 2.0}, {"step_size": 0.0}])
def test_settings_out_of_range(values):
    with pytest.raises(ValueError, match=next(iter(values))):
        replace(RestorationSettings(), **values)


@pytest.mark.parametrize("call", [(8, 8, 0), (8, 8, 9), (8, 8, 8)])
def test_box_out_of_range(call):
    with pytest.raises(ValueError, match="box"):
        restoration.box_mask(*call)


def test_mask_without_known_pixels():
    with pytest.raises(ValueError, match="missing"):
        restoration.random_masks(4, 4, 0.99, 0, range(1))


def test_median_fill():
    """A hole of three pixels is closed from its border inward; known pixels stay."""
    y = torch.full((1, 2, 7, 7), 0.5)
    y[:, 1] = -0.25
    known = restoration.box_mask(7, 7, 5)
    torch.testing.assert_close(restoration.median_fill(y * known, known), y)


@pytest.mark.parametrize("name", DEGRADATIONS)
def test_baselines(name):
    """On a smooth image each simple method is better than the degraded image, where anything of it is left to restore."""
    degradation = DEGRADATIONS[name]
    rows, columns = (torch.arange(n) * 2 * torch.pi / n for n in SHAPE[1:])
    x = (0.4 * rows.sin()[:, None] + 0.4 * columns.cos()).expand(5, *SHAPE)
    originals, y = to_uint8(x), degradation(x)
    degraded = np.mean(score("degraded", originals, to_uint8(degradation.to_image(y))).psnr)
    for restored in baselines(degradation, y, originals).values():
        assert restored.dtype == torch.uint8 and restored.shape == originals.shape
        gain = np.mean(score("", originals, restored).psnr) - degraded
        assert gain == 0 if name in ("gray", "wide blur") else gain > 0
    ramp = (rows[:, None] + columns).expand(5, *SHAPE) / 20 - 0.3
    if name == "box":  # a solution of the biharmonic equation, which no median of its border is
        restored = baselines(degradation, degradation(ramp), to_uint8(ramp))
        assert torch.equal(restored["biharmonic"], to_uint8(ramp))


def test_table():
    """The gain is paired by image: its interval is that of the differences."""
    text = markdown([Scores("bicubic", [10.0, 20.0, 30.0], [0.1, 0.2, 0.3]), Scores(FLOW, [12.0, 22.0, 32.0], [0.2, 0.3, 0.4])])
    assert "2.00 ± 0.00" in text and "20.00 ± 24.84" in text  # 4.30 standard errors: Student's t of three values
    assert mean_and_interval([3.0]) == (3.0, None)
