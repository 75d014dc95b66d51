"""Distances between two sets of features; torch-fidelity's definitions, in blocks of bounded size."""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor
from torch_fidelity.metric_isc import isc_features_to_metric
from torch_fidelity.metric_kid import kid_features_to_metric

from flow.evaluation.comparison import Comparison
from flow.evaluation.intervals import frechet_standard_error, symmetric_root

DEFAULT = ("fid", "isc", "accuracy")  # those that take seconds, whatever the number of images
BLOCK = 4096  # rows and columns of a block of distances: 64 MiB in float32
NEIGHBORHOOD = 3
ISC_SPLITS = 10


def frechet_distance(mu1: np.ndarray, sigma1: np.ndarray, mu2: np.ndarray, sigma2: np.ndarray) -> float:
    """|mu1 - mu2|^2 + tr(sigma1 + sigma2 - 2 (sigma1 sigma2)^(1/2)) (Heusel et al. 2017, arXiv:1706.08500, eq. 6).

    tr (sigma1 sigma2)^(1/2) is the sum of the singular values of sigma1^(1/2) sigma2^(1/2): symmetric decompositions
    only, and exact to rounding for singular covariances, where eigenvalues of the product lose half the digits.
    """
    shared = np.linalg.svd(symmetric_root(sigma1) @ symmetric_root(sigma2), compute_uv=False).sum()
    distance = np.square(mu1 - mu2).sum() + np.trace(sigma1) + np.trace(sigma2) - 2 * shared
    return float(distance)


def precision_recall(
    samples: Tensor, real: Tensor, real_radii: Tensor | None = None, advance: Callable[[], object] = lambda: None
) -> tuple[float, float]:
    """(precision, recall) of features [n, d] against real ones [m, d] (Kynkaanniemi et al. 2019, arXiv:1904.06991).

    Precision is the share of samples that lie within the ball of a real image, recall the share of real images within the
    ball of a sample; a ball reaches to the third nearest neighbor of its center in its own set. Distances are computed in
    float32, a block of BLOCK x BLOCK at a time, with less than 0.5 GB beside the features; `real_radii` are `squared_radii` of
    the real ones where they are known, `advance` is called after each of the `num_blocks`. Raises ValueError for sets without
    three neighbors.
    """
    if min(len(samples), len(real)) <= NEIGHBORHOOD:
        raise ValueError(f"precision and recall need more than {NEIGHBORHOOD} images, not {min(len(samples), len(real))}")
    sample_radii = squared_radii(samples, advance)
    if real_radii is None:
        real_radii = squared_radii(real, advance)
    center = _center(real)
    inside_real, inside_samples = (torch.zeros(len(x), dtype=torch.bool) for x in (samples, real))
    for rows in _blocks(len(samples)):
        a = samples[rows] - center
        for columns in _blocks(len(real)):
            squared = _squared_distances(a, real[columns] - center)
            inside_real[rows] |= (squared <= real_radii[columns]).any(1)
            inside_samples[columns] |= (squared <= sample_radii[rows, None]).any(0)
            advance()
    return inside_real.double().mean().item(), inside_samples.double().mean().item()


def squared_radii(features: Tensor, advance: Callable[[], object] = lambda: None) -> Tensor:
    """Squared distance [n] from each of the features [n, d] to its third nearest neighbor among them."""
    nearest = torch.full((len(features), NEIGHBORHOOD + 1), torch.inf)  # itself included
    center = _center(features)

    def update(rows: slice, squared: Tensor) -> None:
        block = squared.topk(min(NEIGHBORHOOD + 1, squared.shape[1]), largest=False).values
        nearest[rows] = torch.cat([nearest[rows], block], dim=1).topk(NEIGHBORHOOD + 1, largest=False).values

    blocks = _blocks(len(features))
    for i, rows in enumerate(blocks):
        a = features[rows] - center
        for columns in blocks[i:]:
            squared = _squared_distances(a, features[columns] - center)
            if columns == rows:
                squared.fill_diagonal_(0)
            else:
                update(columns, squared.T.contiguous())
            update(rows, squared)
            advance()
    return nearest[:, -1]


def num_blocks(n: int, m: int, real_radii: Tensor | None = None) -> int:
    """Blocks of distances that `precision_recall` of n samples and m real images computes."""
    rows, columns = len(_blocks(n)), len(_blocks(m))
    within_real = columns * (columns + 1) // 2 if real_radii is None else 0
    return rows * (rows + 1) // 2 + within_real + rows * columns


def fid(c: Comparison) -> dict[str, float]:
    """Frechet distance in the feature space of the extractor, with its standard error."""
    name, ref = c.extractor.distance_name, c.reference
    error = frechet_standard_error(c.samples.matrix(c.extractor.layer).numpy(), ref.mu, ref.sigma)
    if error is not None:
        c.standard_errors[name] = error
    return {name: frechet_distance(c.samples.mu, c.samples.sigma, ref.mu, ref.sigma)}


def kid(c: Comparison) -> dict[str, float]:
    """Kernel distance (Binkowski et al. 2018) over 100 subsets of at most 1,000 images."""
    real = c.reference.features
    if real is None:
        return {}
    features = c.samples.matrix(c.extractor.layer)
    size = min(1000, len(features), len(real))
    result = kid_features_to_metric(
        features, real, kid_subsets=100, kid_subset_size=size, kid_kernel="poly", kid_kernel_poly_degree=3,
        kid_kernel_poly_gamma=None, kid_kernel_poly_coef0=1, rng_seed=2020, verbose=False,
    )  # fmt: skip
    return {f"KD-{c.space}" if c.space else "KID": result["kernel_inception_distance_mean"]}


def prc(c: Comparison) -> dict[str, float]:
    """Precision and recall, by the third nearest neighbor."""
    features, real = c.samples.matrix(c.extractor.layer), c.reference.features
    if real is None or min(len(features), len(real)) <= NEIGHBORHOOD:
        return {}
    c.bar.total += num_blocks(len(features), len(real), c.reference.squared_radii)
    if c.reference.squared_radii is None:
        c.reference.squared_radii = squared_radii(real, c.bar.update)
    precision, recall = precision_recall(features, real, c.reference.squared_radii, c.bar.update)
    return {"precision": precision, "recall": recall}


def isc(c: Comparison) -> dict[str, float]:
    """Inception Score over ten splits, for which it needs ten images."""
    layer = c.extractor.isc_layer
    if not layer or layer not in c.samples.rows or c.samples.n < ISC_SPLITS:
        return {}
    return {"IS": isc_features_to_metric(c.samples.matrix(layer), ISC_SPLITS)["inception_score_mean"]}


def accuracy(c: Comparison) -> dict[str, float]:
    """Share of samples that the extractor, a classifier, puts into the requested class."""
    if not c.extractor.classifies or c.labels is None:
        return {}
    return {"accuracy": float((c.samples.matrix("logits").argmax(1).numpy() == c.labels).mean())}


Metric = Callable[[Comparison], dict[str, float]]  # columns of the table; empty where the metric does not apply

METRICS: dict[str, Metric] = {
    "fid": fid,
    "kid": kid,
    "prc": prc,
    "isc": isc,
    "accuracy": accuracy,
}


# Columns of which a larger value is better; of all others, distances, a smaller one.
HIGHER_IS_BETTER = ("IS", "accuracy", "precision", "recall", "held_out_log_p")


def evaluate(c: Comparison, metrics: Sequence[str]) -> dict[str, float]:
    """The requested METRICS by column name, in the order of the registry.

    Raises:
        ValueError: for fewer than two samples, and for features that are not finite.
    """
    if c.samples.n < 2:
        raise ValueError(f"a distance needs at least 2 images, not {c.samples.n}")
    c.samples.check_finite("the samples")
    requested = [name for name in METRICS if name in metrics]
    c.bar.reset(len(requested))
    results: dict[str, float] = {}
    for name in requested:
        c.bar.set_postfix_str(name)
        results |= METRICS[name](c)
        c.bar.update()
    return results


def _center(features: Tensor) -> Tensor:
    """A point among the features: distances that are computed from the origin would round more."""
    return features[:BLOCK].mean(0)


def _blocks(n: int) -> list[slice]:
    return [slice(i, min(i + BLOCK, n)) for i in range(0, n, BLOCK)]


def _squared_distances(a: Tensor, b: Tensor) -> Tensor:
    """|a - b|^2 of features [n, d] and [m, d]: [n, m]."""
    squared = torch.addmm(b.square().sum(1), a, b.T, alpha=-2)
    return squared.add_(a.square().sum(1, keepdim=True)).clamp_(min=0)
