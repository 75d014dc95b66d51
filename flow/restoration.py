"""Restoration of degraded images by a trained flow, without training: linear degradations and PnP-Flow.

A degradation is y = A x + noise. Each operator below has A, its adjoint A^T with <A x, y> = <x, A^T y>, and |A|^2, the largest
eigenvalue of A^T A. `restore` finds an x that fits y and that has high probability under the flow.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from flow.noise import gaussian_noise, generator

LUMA = (0.299, 0.587, 0.114)  # gray of red, green and blue: ITU-R BT.601


class Degradation(Protocol):
    """A linear degradation of images [B, C, H, W]."""

    @property
    def squared_norm(self) -> float:
        """|A|^2, the largest eigenvalue of A^T A."""

    def __call__(self, x: Tensor) -> Tensor:
        """A x of x [B, C, H, W]."""

    def adjoint(self, y: Tensor) -> Tensor:
        """A^T y, [B, C, H, W]."""

    def to_image(self, y: Tensor) -> Tensor:
        """The measurement y as a picture [B, C, H, W] in [-1, 1]."""


@dataclass(frozen=True)
class Inpainting:
    """Keeps the known pixels and sets the others to 0."""

    known: Tensor  # [B or 1, 1, H, W], 1 for known pixels and 0 for missing ones

    squared_norm = 1.0

    def __call__(self, x: Tensor) -> Tensor:
        return x * self.known

    def adjoint(self, y: Tensor) -> Tensor:
        return y * self.known

    def to_image(self, y: Tensor) -> Tensor:
        """Missing pixels are middle gray."""
        return y * self.known


@dataclass(frozen=True)
class Downsampling:
    """Means of squares of factor x factor pixels."""

    factor: int

    @property
    def squared_norm(self) -> float:
        return 1 / self.factor**2

    def __call__(self, x: Tensor) -> Tensor:
        """[B, C, H / factor, W / factor]; H and W must be divisible by the factor."""
        return F.avg_pool2d(x, self.factor)

    def adjoint(self, y: Tensor) -> Tensor:
        return self.to_image(y) / self.factor**2

    def to_image(self, y: Tensor) -> Tensor:
        """Each pixel as a square."""
        return y.repeat_interleave(self.factor, -2).repeat_interleave(self.factor, -1)


@dataclass(frozen=True)
class GaussianBlur:
    """Convolution with a Gaussian of standard deviation sigma pixels, across the borders of a periodic image."""

    sigma: float
    _responses: dict[tuple, Tensor] = field(default_factory=dict, init=False, repr=False, compare=False)

    squared_norm = 1.0

    def kernel(self, height: int, width: int) -> Tensor:
        """The point spread function [H, W], float64, with sum 1 and its center at pixel (0, 0)."""
        return torch.outer(self._line(height), self._line(width))

    def __call__(self, x: Tensor) -> Tensor:
        height, width = x.shape[-2:]
        return torch.fft.irfft2(torch.fft.rfft2(x) * self._response(height, width, x), s=(height, width))

    def adjoint(self, y: Tensor) -> Tensor:
        return self(y)

    def to_image(self, y: Tensor) -> Tensor:
        return y

    def _response(self, height: int, width: int, like: Tensor) -> Tensor:
        """The Fourier transform of the kernel, [H, W // 2 + 1], computed once for each size, device and dtype."""
        key = (height, width, like.device, like.dtype)
        if key not in self._responses:
            with torch.inference_mode(False):  # later calls may record gradients, which inference tensors do not take
                transform = torch.fft.rfft2(self.kernel(height, width).to(like.device, like.dtype))
                self._responses[key] = transform.real.contiguous()  # the kernel is even: there is no imaginary part
        return self._responses[key]

    def _line(self, n: int) -> Tensor:
        """The Gaussian on n pixels of a circle; each pixel sums the copies of the line that fall on it."""
        copies = math.ceil(6 * self.sigma / n) + 1
        distance = torch.arange(n, dtype=torch.float64) + n * torch.arange(-copies, copies + 1, dtype=torch.float64)[:, None]
        line = torch.exp(-0.5 * (distance / self.sigma).square()).sum(0)
        return line / line.sum()


@dataclass(frozen=True)
class Grayscale:
    """The gray of an image with three channels, [B, 1, H, W]: the weights of BT.601."""

    @property
    def squared_norm(self) -> float:
        return sum(weight**2 for weight in LUMA)

    def __call__(self, x: Tensor) -> Tensor:
        return (x * self._weights(x)).sum(1, keepdim=True)

    def adjoint(self, y: Tensor) -> Tensor:
        return y * self._weights(y)

    def to_image(self, y: Tensor) -> Tensor:
        return y.expand(-1, 3, -1, -1)

    @staticmethod
    def _weights(like: Tensor) -> Tensor:
        return like.new_tensor(LUMA).view(1, 3, 1, 1)


def box_mask(height: int, width: int, side: int) -> Tensor:
    """[1, 1, H, W] with a centered square of missing pixels. Raises ValueError where none or no known pixel is left."""
    if not 1 <= side <= min(height, width) or side == height == width:
        raise ValueError(f"a box of {side} pixels does not fit into {height}x{width} with known pixels around it")
    known = torch.ones(1, 1, height, width)
    top, left = (height - side) // 2, (width - side) // 2
    known[..., top : top + side, left : left + side] = 0
    return known


def random_masks(height: int, width: int, missing: float, seed: int, indices: range) -> Tensor:
    """[n, 1, H, W] with a share of `missing` pixels at random places, those of image k a function of (seed, k).

    Raises:
        ValueError: where the share leaves no missing or no known pixel.
    """
    pixels = height * width
    count = round(missing * pixels)
    if not 0 < count < pixels:
        raise ValueError(f"{missing:g} of {height}x{width} pixels: must leave missing and known ones")
    known = torch.ones(len(indices), pixels)
    for row, k in zip(known, indices, strict=True):
        row[torch.from_numpy(generator("restoration mask", seed, k).permutation(pixels)[:count].copy())] = 0
    return known.view(-1, 1, height, width)


@dataclass(frozen=True)
class RestorationSettings:
    """The parameters of `restore`."""

    steps: int = 100  # of t, from 0 to 1
    draws: int = 2  # of noise in each step, in pairs of opposite signs
    step_size: float = 1.9  # of the gradient steps at most, in units of 1 / |A|^2
    data_steps: int = 1  # gradient steps at each time

    def __post_init__(self):
        """Raises ValueError for numbers out of range."""
        for name, value in {"steps": self.steps, "draws": self.draws, "data_steps": self.data_steps}.items():
            if value < 1:
                raise ValueError(f"{name}={value}: must be at least 1")
        if not 0 < self.step_size < 2:
            raise ValueError(f"step_size={self.step_size:g}: must be above 0 and below 2, where gradient steps diverge")


TASKS = {  # with the gradient steps that gave the best PSNR on MNIST, see docs/restoration.md
    "inpaint": RestorationSettings(),
    "super_resolution": RestorationSettings(),
    "deblur": RestorationSettings(data_steps=16),
    "colorize": RestorationSettings(),
}


def restore(
    velocity: Callable[[Tensor, float], Tensor],
    y: Tensor,
    degradation: Degradation,
    noise: Callable[[int, int], Tensor],
    settings: RestorationSettings,
    noise_std: float = 0.0,
    callback: Callable[[], object] = lambda: None,
) -> Tensor:
    """Images [B, C, H, W], about [-1, 1], that fit the measurement y under the flow.

    PnP-Flow (Martin et al. 2024, arXiv:2410.02423). With D_t(x) = x + (1 - t) v(x, t), the mean of x1 given x_t = x, each time
    t = n / steps has three parts:

        z = x - gamma_t A^T (A x - y)                               (fit to y, data_steps times)
        z_t = t z + (1 - t) eps,          eps ~ N(0, I)             (onto the path of the flow)
        x = mean over draws of D_t(z_t)                             (denoise)

    with gamma_t = min(step_size / |A|^2, ((1 - t) / t)^2 / (data_steps noise_std^2)): the second term weighs the error of the
    denoiser, whose input has noise of (1 - t) / t, against the noise of y. With it the result goes to the posterior mean where
    the data are Gaussian, as the steps grow.

    At t = 0 nothing of the first x is left, so it is A^T y / |A|^2. Draws 2k and 2k + 1 of a step are eps and -eps: the
    error of the mean that is linear in eps cancels.

    Args:
        velocity: v(x, t) on the linear path, for images of the batch.
        y: in the dtype in which the images are computed.
        noise: noise(step, k) is standard normal, [B, C, H, W], and belongs to draws 2k and 2k + 1.
        noise_std: the standard deviation of the noise of y. Without noise the result ends with a whole gradient step, after
            which A x = y for all degradations but the blur, where it comes closer.
        callback: is called after each step.
    """
    x = degradation.adjoint(y) / degradation.squared_norm
    for n in range(settings.steps):
        t = n / settings.steps
        z = x
        step_size = settings.step_size
        if t * noise_std > 0:
            trust = ((1 - t) / (t * noise_std)) ** 2
            step_size = min(step_size, trust * degradation.squared_norm / settings.data_steps)
        for _ in range(settings.data_steps):
            z = _data_step(z, y, degradation, step_size)
        denoised = torch.zeros_like(z)
        for k in range(settings.draws):
            if k % 2 == 0:
                eps = noise(n, k // 2).to(z)
            z_t = t * z + (1 - t) * (eps if k % 2 == 0 else -eps)
            denoised += z_t + (1 - t) * velocity(z_t, t)
        x = denoised / settings.draws
        callback()
    return x if noise_std else _data_step(x, y, degradation, 1.0)


def _data_step(x: Tensor, y: Tensor, degradation: Degradation, step_size: float) -> Tensor:
    """A gradient step on |A x - y|^2 / 2, in units of 1 / |A|^2."""
    return x - step_size / degradation.squared_norm * degradation.adjoint(degradation(x) - y)


def measure(x: Tensor, degradation: Degradation, noise_std: float, seed: int, indices: range) -> Tensor:
    """y = A x + noise of images x [B, C, H, W]; the noise of image k is a function of (seed, k)."""
    y = degradation(x)
    return y + noise_std * gaussian_noise("restoration measurement", seed, indices, tuple(y.shape[1:])).to(y)


def median_fill(y: Tensor, known: Tensor) -> Tensor:
    """y [B, C, H, W] with each missing pixel set to the median of its known neighbors, from the border of a hole inward.

    known: [B or 1, 1, H, W]; every image must have a known pixel.
    """
    x = torch.where(known.bool(), y, torch.nan)
    while (missing := x.isnan()).any():
        windows = F.unfold(F.pad(x, (1, 1, 1, 1), value=torch.nan), 3).unflatten(1, (x.shape[1], 9))  # [B, C, 9, H W]
        x = torch.where(missing, windows.nanmedian(2).values.unflatten(-1, x.shape[-2:]), x)
    return x
