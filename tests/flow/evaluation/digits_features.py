"""Noisy digits and their features: what the tests of this folder measure."""

from pathlib import Path

import torch
from PIL import Image

import datasets
from flow.evaluation import metrics, reference
from flow.evaluation.comparison import Comparison, Estimate
from flow.evaluation.features import Extractor, FeatureSet

CPU = torch.device("cpu")


def write_folder(folder: Path, images: torch.Tensor) -> Path:
    folder.mkdir(parents=True)
    for k, image in enumerate(images):
        Image.fromarray(image.permute(1, 2, 0).squeeze(-1).numpy()).save(folder / f"{k:04d}.png")
    return folder


def feature_set(images: torch.Tensor, extractor: Extractor) -> FeatureSet:
    features = FeatureSet()
    for first in range(0, len(images), 100):
        part = images[first : first + 100]
        features.add(extractor.layer, range(first, first + len(part)), extractor(part))
    return features


def noisy_digits(n: int, sigma: float = 30.0) -> torch.Tensor:
    images = datasets.build("digits", None, {}).images[:n].float()
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(1))
    return (images + sigma * noise).clamp(0, 255).to(torch.uint8)


def estimates(comparison: Comparison, *names: str) -> dict[str, Estimate]:
    """The columns of these metrics."""
    by_metric = metrics.evaluate(comparison, names)
    return {column: estimate for columns in by_metric.values() for column, estimate in columns.items()}


def values(comparison: Comparison, *names: str) -> dict[str, float]:
    """The same without their standard errors."""
    return {column: estimate.value for column, estimate in estimates(comparison, *names).items()}


def digits_extractor() -> Extractor:
    return Extractor("digits", None, None, CPU)


def digits_reference(extractor: Extractor) -> reference.Reference:
    return reference.from_features("digits", "x", feature_set(noisy_digits(1797, 0), extractor), extractor.layer)
