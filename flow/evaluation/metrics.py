"""Distances between two sets of features; torch-fidelity's definitions."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torch_fidelity.metric_isc import isc_features_to_metric
from torch_fidelity.metric_kid import kid_features_to_metric
from torch_fidelity.metric_prc import prc_features_to_metric

from flow.evaluation.features import Extractor, FeatureSet
from flow.evaluation.reference import Reference

METRICS = ("fid", "kid", "prc", "isc", "accuracy")


def frechet_distance(mu1: np.ndarray, sigma1: np.ndarray, mu2: np.ndarray, sigma2: np.ndarray) -> float:
    """|mu1 - mu2|^2 + tr(sigma1 + sigma2 - 2 (sigma1 sigma2)^(1/2)) (Heusel et al. 2017, arXiv:1706.08500, eq. 6).

    tr (sigma1 sigma2)^(1/2) is the sum of the singular values of sigma1^(1/2) sigma2^(1/2): symmetric decompositions
    only, and exact to rounding for singular covariances, where eigenvalues of the product lose half the digits.
    """
    shared = np.linalg.svd(_root(sigma1) @ _root(sigma2), compute_uv=False).sum()
    distance = np.square(mu1 - mu2).sum() + np.trace(sigma1) + np.trace(sigma2) - 2 * shared
    return float(distance)


def evaluate(
    extractor: Extractor, samples: FeatureSet, reference: Reference, labels: np.ndarray | None, metrics: Sequence[str]
) -> dict[str, float]:
    """The asked-for METRICS by column name; those that the extractor, the reference or absent labels [n] do not allow are
    left out. KID uses 100 subsets of at most 1,000 images, precision and recall the third nearest neighbour."""
    found: dict[str, float] = {}
    space = "" if extractor.distance_name == "FID" else extractor.distance_name.removeprefix("FD-")
    if "fid" in metrics:
        found[extractor.distance_name] = frechet_distance(samples.mu, samples.sigma, reference.mu, reference.sigma)
    features = samples.matrix(extractor.layer)
    if reference.features is not None:
        real = reference.features
        if "kid" in metrics:
            size = min(1000, len(features), len(real))
            kid = kid_features_to_metric(
                features, real, kid_subsets=100, kid_subset_size=size, kid_kernel="poly", kid_kernel_poly_degree=3,
                kid_kernel_poly_gamma=None, kid_kernel_poly_coef0=1, rng_seed=2020, verbose=False,
            )  # fmt: skip
            found[f"KD-{space}" if space else "KID"] = kid["kernel_inception_distance_mean"]
        if "prc" in metrics and min(len(features), len(real)) > 3:
            prc = prc_features_to_metric(
                features, real, prc_neighborhood=3, prc_batch_size=10_000, save_cpu_ram=True, verbose=False
            )
            found["precision"], found["recall"] = prc["precision"], prc["recall"]
    if "isc" in metrics and extractor.isc_layer:
        found["IS"] = isc_features_to_metric(samples.matrix(extractor.isc_layer))["inception_score_mean"]
    if "accuracy" in metrics and extractor.classifies and labels is not None:
        found["accuracy"] = float((samples.matrix("logits").argmax(1).numpy() == labels).mean())
    return found


def psnr(images: Tensor, others: Tensor) -> Tensor:
    """Peak signal-to-noise ratio [B] in decibels of uint8 images [B, C, H, W]: 10 log10(255^2 / mean squared difference), at
    most 100."""
    error = (images.double() - others.double()).square().flatten(1).mean(1)
    return (10 * torch.log10(255**2 / error)).clamp(max=100)


def _root(sigma: np.ndarray) -> np.ndarray:
    """Symmetric square root of a covariance matrix."""
    values, vectors = np.linalg.eigh((sigma + sigma.T) / 2)
    return (vectors * np.sqrt(values.clip(0))) @ vectors.T
