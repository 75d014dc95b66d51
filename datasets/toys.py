"""2-D data sets: points whose distribution can be looked at, with its exact density where that has a formula.

All lie in about [-2, 2] x [-2, 2]. Point k is a function of (seed, k): a set of any size begins with the same points.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from datasets.encoded import read_image
from datasets.images import Images

UNIFORMS_PER_POINT = 4  # uniform numbers that a point is made from
MAX_POINTS = 10_000_000  # 320 MB of uniform numbers: a snapshot's header may name any number
SIDE = 4.0  # of the square
INSIDE = 1e-6  # from the edge of a square of the checkerboard: rounding to float32 must not lead out of it


@dataclass(kw_only=True)
class PointSet(Images):
    """A set of points in memory: what an image is to other sets, a point is here."""

    log_density: Callable[[Tensor], Tensor] | None  # of points [N, 2], in nats, where it is known exactly


def toys(root: Path, name: str, n: int = 100_000, seed: int = 0, path: str | None = None) -> PointSet:
    """n points of the set `name`, a key of TOYS; "image" takes a black-and-white picture at `path` (below `root` or as it is),
    whose darkness is the density. Raises ValueError for an unknown name, n out of range and a picture without a dark pixel.
    """
    if name not in TOYS:
        raise ValueError(f"unknown 2-D data set {name!r}; choose from {', '.join(TOYS)}")
    if not isinstance(n, int) or not 1 <= n <= MAX_POINTS:
        raise ValueError(f"n={n}: must be a whole number from 1 to {MAX_POINTS:,}")
    if not isinstance(seed, int) or not 0 <= seed < 2**64:
        raise ValueError(f"seed={seed}: must be a whole number from 0 to 2^64 - 1")
    if (name == "image") != (path is not None):
        raise ValueError(f"path={path}: name=image and a path need each other")
    u = np.random.Generator(np.random.Philox(key=seed)).random((n, UNIFORMS_PER_POINT))
    points = image(u, _picture(root, path)) if path is not None else TOYS[name](u)
    return PointSet(torch.from_numpy(points).float(), None, (), log_density=LOG_DENSITIES.get(name))


def checkerboard(u: np.ndarray) -> np.ndarray:
    """Uniform on the dark squares of a 4 x 4 board."""
    column = np.floor(4 * u[:, 0])
    row = 2 * np.floor(2 * u[:, 1]) + column % 2
    x, y = np.clip(u[:, 2:], INSIDE, 1 - INSIDE).T
    return np.stack([column + x, row + y], axis=1) - 2


def eight_gaussians(u: np.ndarray) -> np.ndarray:
    """Eight narrow Gaussians on a circle."""
    return _gaussian(u, RING, np.full(8, 1 / 8), np.full((8, 2), 0.12))


def mixture(u: np.ndarray) -> np.ndarray:
    """Three Gaussians of different weight, width and direction along the axes."""
    return _gaussian(u, MEANS, WEIGHTS, SCALES)


def moons(u: np.ndarray) -> np.ndarray:
    """Two interleaved half circles."""
    upper = u[:, 0] < 0.5
    angle = math.pi * u[:, 1]
    x = np.where(upper, np.cos(angle), 1 - np.cos(angle))
    y = np.where(upper, np.sin(angle), 0.5 - np.sin(angle))
    return 1.3 * (np.stack([x - 0.5, y - 0.25], axis=1) + 0.06 * _normal(u[:, 2:]))


def spirals(u: np.ndarray) -> np.ndarray:
    """Two arms, one and a half turns each."""
    along = np.sqrt(u[:, 1])
    angle = 3 * math.pi * along + math.pi * (u[:, 0] < 0.5)
    arm = 1.9 * along[:, None] * np.stack([np.cos(angle), np.sin(angle)], axis=1)
    return arm + 0.05 * _normal(u[:, 2:])


def rings(u: np.ndarray) -> np.ndarray:
    """Three circles around the origin, as many points on each piece of any."""
    radius = np.array([0.6, 1.2, 1.8])[np.searchsorted([1 / 6, 1 / 2], u[:, 0])]
    angle = 2 * math.pi * u[:, 1]
    return radius[:, None] * np.stack([np.cos(angle), np.sin(angle)], axis=1) + 0.06 * _normal(u[:, 2:])


def pinwheel(u: np.ndarray) -> np.ndarray:
    """Five curved blades."""
    arm = np.floor(5 * u[:, 0])
    across = _normal(u[:, 2:])
    radial, tangential = 1 + 0.3 * across[:, 0], 0.1 * across[:, 1]
    angle = 2 * math.pi * arm / 5 + 0.9 * np.exp(radial - 1)
    cos, sin = np.cos(angle), np.sin(angle)
    return 1.1 * np.stack([radial * cos - tangential * sin, radial * sin + tangential * cos], axis=1)


def image(u: np.ndarray, darkness: np.ndarray) -> np.ndarray:
    """Points in the pixels of a picture, as many as they are dark; its longer side fills the square. darkness: [H, W]."""
    height, width = darkness.shape
    cumulative = np.cumsum(darkness.ravel())
    pixel = np.searchsorted(cumulative, u[:, 0] * cumulative[-1], side="right")
    x, y = pixel % width + u[:, 1], pixel // width + u[:, 2]
    return np.stack([x - width / 2, height / 2 - y], axis=1) * SIDE / max(height, width)


def _picture(root: Path, path: str) -> np.ndarray:
    """Darkness in [0, 1], [H, W]."""
    file = Path(path) if Path(path).is_file() or Path(path).is_absolute() else root / path
    if not file.is_file():
        raise FileNotFoundError(f"path={path}: there is no such picture")
    try:
        picture = read_image(file, None, 1)[0]
    except Exception as error:  # Pillow raises a dozen kinds
        raise ValueError(f"path={path}: is no picture that can be read ({error})") from None
    darkness = 1 - picture.numpy() / 255
    if not darkness.any():
        raise ValueError(f"path={path}: the picture is all white; its dark parts are the density")
    return darkness


def _normal(u: np.ndarray) -> np.ndarray:
    """Standard normal numbers [N, 2] from uniform ones (Box & Muller 1958)."""
    radius = np.sqrt(-2 * np.log1p(-u[:, 0]))
    angle = 2 * math.pi * u[:, 1]
    return radius[:, None] * np.stack([np.cos(angle), np.sin(angle)], axis=1)


def _gaussian(u: np.ndarray, means: np.ndarray, weights: np.ndarray, scales: np.ndarray) -> np.ndarray:
    component = np.searchsorted(np.cumsum(weights)[:-1], u[:, 0], side="right")
    return means[component] + scales[component] * _normal(u[:, 2:])


def _log_mixture(means: np.ndarray, weights: np.ndarray, scales: np.ndarray) -> Callable[[Tensor], Tensor]:
    """The log-density of a mixture of Gaussians with these standard deviations along the axes."""

    def log_density(x: Tensor) -> Tensor:
        mu, w, s = (torch.from_numpy(a).to(x) for a in (means, weights, scales))
        z = (x[:, None] - mu) / s  # [N, K, 2]
        parts = w.log() - 0.5 * z.square().sum(2) - s.log().sum(1) - math.log(2 * math.pi)
        return parts.logsumexp(1)

    return log_density


def _log_checkerboard(x: Tensor) -> Tensor:
    inside = (x.abs() < 2).all(1) & (((x + 2).floor().sum(1) % 2) == 0)
    return torch.where(inside, -math.log(8.0), -math.inf).to(x)


RING = np.stack([1.5 * np.cos(np.arange(8) * math.pi / 4), 1.5 * np.sin(np.arange(8) * math.pi / 4)], axis=1)
MEANS = np.array([[-1.0, 0.8], [1.1, 0.6], [0.0, -1.0]])
WEIGHTS = np.array([0.3, 0.2, 0.5])
SCALES = np.array([[0.35, 0.2], [0.2, 0.45], [0.7, 0.25]])

TOYS: dict[str, Callable[..., np.ndarray]] = {
    f.__name__: f for f in (checkerboard, eight_gaussians, mixture, moons, spirals, rings, pinwheel, image)
}
LOG_DENSITIES: dict[str, Callable[[Tensor], Tensor]] = {
    "checkerboard": _log_checkerboard,
    "eight_gaussians": _log_mixture(RING, np.full(8, 1 / 8), np.full((8, 2), 0.12)),
    "mixture": _log_mixture(MEANS, WEIGHTS, SCALES),
}
