"""Metrics of two sets of features; torch-fidelity's definitions where it has them, each with its standard error."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor
from torch_fidelity.metric_isc import isc_features_to_metric
from torch_fidelity.metric_kid import kid_features_to_metric

from flow import registry
from flow.evaluation import intervals, memorization, neighbors, results
from flow.evaluation.classifiers import CLASS_NAMES
from flow.evaluation.comparison import Comparison, Estimate
from flow.evaluation.frechet import extrapolated_distance, frechet_distance
from flow.evaluation.moments import Moments
from flow.evaluation.neighbors import DENSITY_NEIGHBORS, PRECISION_NEIGHBORS, Neighborhoods
from flow.evaluation.reference import same_classes

DEFAULT = ("fid", "isc", "accuracy")  # those that take seconds, whatever the number of images
ISC_SPLITS = 10
KID_SUBSETS, KID_SUBSET_SIZE = 100, 1000
KID_ERROR_IMAGES = 4096  # a set, at most, that its standard error is estimated from


def fid(c: Comparison) -> dict[str, Estimate]:
    """Frechet distance in the feature space of the extractor; its interval is about its mean at this n (delta method)."""
    samples, reference = c.samples.moments, c.reference.moments
    error = intervals.frechet_standard_error(c.matrix().numpy(), samples, reference)
    return {c.extractor.distance_name: Estimate(frechet_distance(samples, reference), error)}


def fd_inf(c: Comparison) -> dict[str, Estimate]:
    """Frechet distance of infinitely many samples, extrapolated; its interval is about that limit."""
    result = extrapolated_distance(c.matrix().numpy(), c.samples.moments, c.reference.moments)
    return {} if result is None else {f"{c.extractor.distance_name}_inf": Estimate(*result)}


def per_class(c: Comparison) -> dict[str, Estimate]:
    """Frechet distance of each class, of those with more images than features among the samples and in the reference."""
    real, ref = c.reference.features, c.reference
    if real is None or ref.labels is None or c.labels is None:
        return {}
    features = c.matrix()
    distances = {}
    for label, class_name in enumerate(ref.class_names):
        samples, others = features[c.labels == label].numpy(), real[ref.labels == label].numpy()
        if min(len(samples), len(others)) <= real.shape[1]:
            continue
        column = results.class_column(c.extractor.distance_name, class_name)
        moments, target = Moments.of(samples), Moments.of(others)
        error = intervals.frechet_standard_error(samples, moments, target)
        distances[column] = Estimate(frechet_distance(moments, target), error)
    return distances


def kid(c: Comparison) -> dict[str, Estimate]:
    """Kernel distance (Binkowski et al. 2018, arXiv:1801.01401) over 100 subsets of at most 1,000 images.

    The variance is that of the mean over the subsets, for these samples, and that of the samples (`kernel_variance`).
    """
    real = c.reference.features
    if real is None:
        return {}
    features = c.matrix()
    size = min(KID_SUBSET_SIZE, len(features), len(real))
    result = kid_features_to_metric(
        features, real, kid_subsets=KID_SUBSETS, kid_subset_size=size, kid_kernel="poly", kid_kernel_poly_degree=3,
        kid_kernel_poly_gamma=None, kid_kernel_poly_coef0=1, rng_seed=2020, verbose=False,
    )  # fmt: skip
    error = None
    if len(features) > 2:
        variance = kernel_variance(features, real) + result["kernel_inception_distance_std"] ** 2 / KID_SUBSETS
        error = float(np.sqrt(variance))
    return {f"KD-{c.space}" if c.space else "KID": Estimate(result["kernel_inception_distance_mean"], error)}


def kernel_variance(features: Tensor, real: Tensor) -> float:
    """Variance of the kernel distance of features [n, d], n > 2, to real ones [m, d], by a jackknife over the samples.

    With the kernel k(x, y) = (x^T y / d + 1)^3 and one sample left out at a time. Of more than KID_ERROR_IMAGES a set that
    many are used, spread over the set, and the variance is scaled by their share.
    """
    n = len(features)
    x, y = (z[torch.linspace(0, len(z) - 1, min(len(z), KID_ERROR_IMAGES)).long()].double() for z in (features, real))
    within, across = (((x @ z.T) / x.shape[1] + 1) ** 3 for z in (x, y))
    others = within.sum(1) - within.diagonal()  # [s], of each sample with all others
    s, total = len(x), others.sum()
    left_out = (total - 2 * others) / ((s - 1) * (s - 2)) - 2 * (across.mean() * s - across.mean(1)) / (s - 1)
    return float((s - 1) * left_out.var(correction=0) * s / n)


def prc(c: Comparison) -> dict[str, Estimate]:
    """Precision and recall by the third nearest neighbor (Kynkaanniemi et al. 2019, arXiv:1904.06991).

    Precision is the share of samples that lie within the ball of a real image, recall the share of real images within the
    ball of a sample; a ball reaches to the third nearest neighbor of its center in its own set. Intervals: of a share of n
    samples; of recall by a jackknife over blocks of samples, with new balls for those that remain.
    """
    balls = neighborhoods(c, PRECISION_NEIGHBORS)
    if balls is None or balls.recalled is None or balls.recall_left_out is None:
        return {}
    precision = balls.precise.double().mean().item()
    recall = balls.recalled.double().mean().item()
    return {
        "precision": Estimate(precision, intervals.share_standard_error(precision, len(balls.precise))),
        "recall": Estimate(recall, intervals.jackknife_standard_error(balls.recall_left_out)),
    }


def density_coverage(c: Comparison) -> dict[str, Estimate]:
    """Density and coverage by the fifth nearest neighbor (Naeem et al. 2020, arXiv:2002.09797).

    Density is the mean over samples of the number of real images whose ball holds them, divided by five, coverage the share
    of real images whose ball holds a sample. Only real images have balls, so that an outlier among the samples counts for
    little. Intervals: of a mean over samples; of coverage by a jackknife over blocks of samples.
    """
    balls = neighborhoods(c, DENSITY_NEIGHBORS)
    if balls is None:
        return {}
    density = balls.dense.double().numpy() / DENSITY_NEIGHBORS
    coverage = balls.covered.double().mean().item()
    return {
        "density": Estimate(float(density.mean()), intervals.mean_standard_error(density)),
        "coverage": Estimate(coverage, intervals.jackknife_standard_error(balls.coverage_left_out)),
    }


def neighborhoods(c: Comparison, more_than: int) -> Neighborhoods | None:
    """Neighborhoods of samples and reference, computed once for all requested metrics; None where either has no more than
    `more_than` members."""
    features = c.matrix()
    real = c.reference.features
    if real is None or min(len(features), len(real)) <= more_than:
        return None
    if c.neighborhoods is None:
        recall = "prc" in c.requested
        known = c.reference.neighbors
        sets = [features] * recall + [real] * (known is None)  # whose own neighbors are computed
        c.bar.total += sum(neighbors.num_blocks(len(x)) for x in sets) + neighbors.num_blocks(len(features), len(real))
        if known is None:
            known = c.reference.neighbors = neighbors.nearest_neighbors(real, DENSITY_NEIGHBORS, c.bar.update)[0]
        c.neighborhoods = neighbors.compare(features, real, known, recall, c.bar.update)
    return c.neighborhoods


def copied_share(c: Comparison) -> dict[str, Estimate]:
    """Share of samples that lie closer to a training image than 1% of held-out real images do.

    The expected value without memorization is 0.01. No such number tells memorization from underfitting or a lack of modes
    (Stein et al. 2023, arXiv:2306.04675): samples that all lie where training images are dense score more, too, so that the
    nearest pairs are drawn as well. Interval: of a share of n samples, for this threshold.
    """
    if c.training is None:
        return {}
    features = c.matrix()
    c.bar.total += neighbors.num_blocks(len(features), len(c.training.features))
    distances, positions = neighbors.nearest_of(features, c.training.features, c.bar.update)
    c.closest = memorization.closest(distances, positions, c.training.threshold)
    share = (distances < c.training.threshold).double().mean().item()
    return {"memorization": Estimate(share, intervals.share_standard_error(share, len(features)))}


def isc(c: Comparison) -> dict[str, Estimate]:
    """Inception Score over ten splits, for which it needs ten images; its interval is that of their mean by Student's t."""
    layer = c.extractor.isc_layer
    if not layer or layer not in c.layers or c.samples.n < ISC_SPLITS:
        return {}
    result = isc_features_to_metric(c.matrix(layer), ISC_SPLITS)
    error = result["inception_score_std"] / (ISC_SPLITS - 1) ** 0.5
    wider = intervals.student_t(ISC_SPLITS) / intervals.NORMAL_95  # as tables multiply by the latter
    return {"IS": Estimate(result["inception_score_mean"], wider * error)}


def accuracy(c: Comparison) -> dict[str, Estimate]:
    """Share of samples that the classifier puts into the requested class; interval: of a share of n samples.

    Where the labels are of classes of other names, or, if nobody knows these, the reference has others, there is none.
    """
    layer, classifier = c.extractor.class_layer, c.extractor.classifier
    if not classifier or layer not in c.layers or c.labels is None:
        return {}
    names = c.class_names or c.reference.class_names
    if names and not same_classes(names, CLASS_NAMES[classifier]):
        return {}
    share = float((c.matrix(layer).argmax(1).numpy() == c.labels).mean())
    return {"accuracy": Estimate(share, intervals.share_standard_error(share, len(c.labels)))}


Direction = Literal["higher", "lower"]


@dataclass(frozen=True)
class Metric:
    """A function that returns columns of the table, plain numbers or estimates; none where it does not apply."""

    columns: Callable[[Comparison], Mapping[str, Estimate | float]]
    better: Mapping[str, Direction] = field(default_factory=dict)  # which values of a column are better, for evaluate.keep_best

    def __post_init__(self) -> None:
        for column, direction in self.better.items():
            if direction not in get_args(Direction):
                raise ValueError(f"{column}: {direction!r} is better; must be {' or '.join(get_args(Direction))}")


METRICS: dict[str, Metric] = {  # columns of distances, whose names go by the extractor, are better where they are lower
    "fid": Metric(fid),
    "fd_inf": Metric(fd_inf),
    "kid": Metric(kid),
    "prc": Metric(prc, {"precision": "higher", "recall": "higher"}),
    "density_coverage": Metric(density_coverage, {"density": "higher", "coverage": "higher"}),
    "memorization": Metric(copied_share, {"memorization": "lower"}),
    "isc": Metric(isc, {"IS": "higher"}),
    "accuracy": Metric(accuracy, {"accuracy": "higher"}),
    results.PER_CLASS: Metric(per_class),
}


def directions() -> dict[str, Direction]:
    """Which values of a column are better, of all columns but distances."""
    declared = {column: direction for metric in METRICS.values() for column, direction in metric.better.items()}
    return {**declared, "held_out_log_p": "higher"}


def evaluate(c: Comparison, metrics: Sequence[str]) -> dict[str, dict[str, Estimate]]:
    """The columns of each requested metric, in the order of the registry; none where it does not apply: no labels, statistics
    alone, few images.

    Raises:
        ValueError: for fewer than two samples, for features that are not finite, and for a metric that returns no columns.
    """
    if c.samples.n < 2:
        raise ValueError(f"a distance needs at least 2 images, not {c.samples.n}")
    c.samples.check_finite("the samples")
    c.requested = tuple(name for name in METRICS if name in metrics)
    c.bar.reset(len(c.requested))
    columns = {}
    for name in c.requested:
        c.bar.set_postfix_str(name)
        columns[name] = _estimates(name, METRICS[name].columns(c))
        c.bar.update()
    return columns


def _estimates(name: str, columns: Any) -> dict[str, Estimate]:
    """What a metric returned, with plain numbers as estimates without an interval."""
    if not isinstance(columns, Mapping):
        raise ValueError(f"metric {name}: returns {registry.kind_of(columns)}; must return a dict, a number for each column")
    estimates = {}
    for column, value in columns.items():
        try:
            estimates[column] = value if isinstance(value, Estimate) else Estimate(float(value))
        except (TypeError, ValueError):
            raise ValueError(f"metric {name}: {column} is {registry.kind_of(value)}; must be a number or an Estimate") from None
    return estimates
