"""Distances between two sets of 2-D points, and the space in which they are measured."""

from collections.abc import Sequence

import torch
from torch import Tensor

from flow.likelihood import log_likelihood
from flow.solvers import Velocity

DIRECTIONS = 128
BANDWIDTH = 0.5  # of the kernel of the MMD
PAIRWISE = 4000  # points a set, at most, for distances that look at all pairs


class PointExtractor:
    """What an Extractor is to images: points are their own features."""

    name, layer, weights_hash = "points", "xy", ""
    distance_name = "SW2"
    layers = ("xy",)
    classifier, class_layer, second_net, isc_layer = None, None, None, None

    def dimension(self, image_shape: tuple[int, ...]) -> int:
        return image_shape[0]

    def identity(self, layers: Sequence[str]) -> str:
        return f"{self.name} {self.layer} {self.weights_hash}"

    def __call__(self, points: Tensor) -> dict[str, Tensor]:
        return {self.layer: points.float().cpu()}


def sliced_wasserstein(a: Tensor, b: Tensor) -> float:
    """Sliced 2-Wasserstein distance of points a [N, 2] and b [M, 2], in their unit of length.

    The root of the mean, over 128 directions evenly spread over a half circle, of the squared 2-Wasserstein distance of
    the projections (Bonneel et al. 2015, doi:10.1007/s10851-014-0506-3), which in one dimension compares quantiles.
    """
    n = min(len(a), len(b))
    angles = torch.arange(DIRECTIONS, dtype=torch.float64) * (torch.pi / DIRECTIONS)
    directions = torch.stack([angles.cos(), angles.sin()])  # [2, K]
    levels = (torch.arange(n, dtype=torch.float64) + 0.5) / n

    def quantiles(x: Tensor) -> Tensor:
        projected = (x.double() @ directions).sort(dim=0).values  # [N, K]
        return projected if len(x) == n else projected[(levels * len(x)).long()]

    return (quantiles(a) - quantiles(b)).square().mean().sqrt().item()


def energy_distance(a: Tensor, b: Tensor) -> float:
    """2 E|a - b| - E|a - a'| - E|b - b'| of points [N, 2] and [M, 2], with the pairs of a point and itself left out (Szekely &
    Rizzo 2013, doi:10.1016/j.jspi.2013.03.018): 0 on average, below it by chance, for two samples of one distribution."""
    a, b = a[:PAIRWISE].double(), b[:PAIRWISE].double()
    return 2 * torch.cdist(a, b).mean().item() - _mean_of_pairs(torch.cdist(a, a)) - _mean_of_pairs(torch.cdist(b, b))


def mmd(a: Tensor, b: Tensor) -> float:
    """Unbiased squared maximum mean discrepancy of points [N, 2] and [M, 2] with the kernel exp(-|x - y|^2 / (2 BANDWIDTH^2))
    (Gretton et al. 2012, JMLR 13, eq. 3)."""
    a, b = a[:PAIRWISE].double(), b[:PAIRWISE].double()

    def kernel(x: Tensor, y: Tensor) -> Tensor:
        return torch.exp(-torch.cdist(x, y).square() / (2 * BANDWIDTH**2))

    return _mean_of_pairs(kernel(a, a)) + _mean_of_pairs(kernel(b, b)) - 2 * kernel(a, b).mean().item()


def evaluate(points: Tensor, real: Tensor) -> dict[str, float]:
    """SW2, MMD and energy distance of points [N, 2] to real ones. Raises ValueError for points that are not finite."""
    bad = ~points.isfinite().all(1)
    if bad.any():
        raise ValueError(f"{int(bad.sum())} of {len(points)} points of the samples are not finite (NaN or infinite)")
    return {
        "SW2": sliced_wasserstein(points, real), "MMD": mmd(points, real), "energy": energy_distance(points, real)
    }  # fmt: skip


def mean_log_likelihood(velocity: Velocity, x1: Tensor) -> float:
    """Mean log-density in nats of points x1 [N, 2], float64, under the flow of the velocity: dopri5 backwards in time with the
    exact divergence. For points that training never saw this is low where the flow misses a part of the data, and a flow that
    collapses loses by it; the density of the data at samples of the flow rewards both."""
    log_p, _, _ = log_likelihood(velocity, x1)
    return log_p.mean().item()


def _mean_of_pairs(matrix: Tensor) -> float:
    n = len(matrix)
    return ((matrix.sum() - matrix.diagonal().sum()) / (n * (n - 1))).item()
