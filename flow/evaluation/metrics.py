"""Distances between two sets of features; torch-fidelity's definitions, in blocks of bounded size."""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor
from torch_fidelity.metric_isc import isc_features_to_metric
from torch_fidelity.metric_kid import kid_features_to_metric
from tqdm import tqdm

from flow.evaluation.features import Extractor, FeatureSet
from flow.evaluation.reference import Reference

METRICS = ("fid", "kid", "prc", "isc", "accuracy")
DEFAULT = ("fid", "isc", "accuracy")  # those that take seconds, whatever the number of images
BLOCK = 4096  # rows and columns of a block of distances: 64 MiB in float32
NEIGHBORHOOD = 3
ISC_SPLITS = 10


def frechet_distance(mu1: np.ndarray, sigma1: np.ndarray, mu2: np.ndarray, sigma2: np.ndarray) -> float:
    """|mu1 - mu2|^2 + tr(sigma1 + sigma2 - 2 (sigma1 sigma2)^(1/2)) (Heusel et al. 2017, arXiv:1706.08500, eq. 6).

    tr (sigma1 sigma2)^(1/2) is the sum of the singular values of sigma1^(1/2) sigma2^(1/2): symmetric decompositions
    only, and exact to rounding for singular covariances, where eigenvalues of the product lose half the digits.
    """
    shared = np.linalg.svd(_root(sigma1) @ _root(sigma2), compute_uv=False).sum()
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


def evaluate(
    extractor: Extractor,
    samples: FeatureSet,
    reference: Reference,
    labels: np.ndarray | None,
    metrics: Sequence[str],
    bar: tqdm | None = None,
) -> dict[str, float]:
    """The requested METRICS by column name; those that the extractor, the reference or absent labels [n] do not allow are
    left out. KID uses 100 subsets of at most 1,000 images, precision and recall the third nearest neighbor, the Inception
    Score ten splits, for which it needs ten images. `bar` gets the work as its total. Raises ValueError for features that
    are not finite."""
    if samples.n < 2:
        raise ValueError(f"a distance needs at least 2 images, not {samples.n}")
    samples.check_finite("the samples")
    bar = tqdm(disable=True) if bar is None else bar
    results: dict[str, float] = {}
    space = "" if extractor.distance_name == "FID" else extractor.distance_name.removeprefix("FD-")
    features, real = samples.matrix(extractor.layer), reference.features
    requested = [name for name in METRICS if name in metrics]
    with_prc = "prc" in requested and real is not None and min(len(features), len(real)) > NEIGHBORHOOD
    blocks = num_blocks(len(features), len(real), reference.squared_radii) if with_prc and real is not None else 0
    bar.reset(len(requested) + blocks)
    for name in requested:
        bar.set_postfix_str(name)
        if name == "fid":
            results[extractor.distance_name] = frechet_distance(samples.mu, samples.sigma, reference.mu, reference.sigma)
        elif name == "kid" and real is not None:
            size = min(1000, len(features), len(real))
            kid = kid_features_to_metric(
                features, real, kid_subsets=100, kid_subset_size=size, kid_kernel="poly", kid_kernel_poly_degree=3,
                kid_kernel_poly_gamma=None, kid_kernel_poly_coef0=1, rng_seed=2020, verbose=False,
            )  # fmt: skip
            results[f"KD-{space}" if space else "KID"] = kid["kernel_inception_distance_mean"]
        elif name == "prc" and real is not None and with_prc:
            if reference.squared_radii is None:
                reference.squared_radii = squared_radii(real, bar.update)
            pair = precision_recall(features, real, reference.squared_radii, bar.update)
            results["precision"], results["recall"] = pair
        elif name == "isc" and extractor.isc_layer and extractor.isc_layer in samples.rows and samples.n >= ISC_SPLITS:
            logits = samples.matrix(extractor.isc_layer)
            results["IS"] = isc_features_to_metric(logits, ISC_SPLITS)["inception_score_mean"]
        elif name == "accuracy" and extractor.classifies and labels is not None:
            results["accuracy"] = float((samples.matrix("logits").argmax(1).numpy() == labels).mean())
        bar.update()
    return results


def _root(sigma: np.ndarray) -> np.ndarray:
    """Symmetric square root of a covariance matrix."""
    values, vectors = np.linalg.eigh((sigma + sigma.T) / 2)
    return (vectors * np.sqrt(values.clip(0))) @ vectors.T


def _center(features: Tensor) -> Tensor:
    """A point among the features: distances that are computed from the origin would round more."""
    return features[:BLOCK].mean(0)


def _blocks(n: int) -> list[slice]:
    return [slice(i, min(i + BLOCK, n)) for i in range(0, n, BLOCK)]


def _squared_distances(a: Tensor, b: Tensor) -> Tensor:
    """|a - b|^2 of features [n, d] and [m, d]: [n, m]."""
    squared = torch.addmm(b.square().sum(1), a, b.T, alpha=-2)
    return squared.add_(a.square().sum(1, keepdim=True)).clamp_(min=0)
