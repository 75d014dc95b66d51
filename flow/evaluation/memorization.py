"""Whether samples are copies of training images: distances in feature space to the nearest of them."""

from dataclasses import dataclass

import numpy as np
from torch import Tensor

from datasets import DataSet
from flow.evaluation.neighbors import nearest_neighbors, nearest_of

QUANTILE = 0.01  # of held-out real images that count as copies by chance
DUPLICATE = 1e-5  # squared distance, over the variance of the features: below it are copies; rounding reaches 1e-6
PAIRS = 24  # of samples and training images in the figure


@dataclass
class TrainingSet:
    """Features of the images that weights were trained on, and how near to them a real image comes by chance."""

    data: DataSet
    features: Tensor  # [m, d]
    threshold: float  # squared distance; a share QUANTILE of held-out real images is nearer to a training image


@dataclass
class Closest:
    """The samples nearest to a training image, in order."""

    samples: list[int]  # positions
    training: list[int]  # positions of their nearest training images
    ratios: list[float]  # of the distance to that of the threshold; below 1 the sample counts as a copy


def training_set(data: DataSet, features: Tensor, held_out: Tensor | None) -> TrainingSet:
    """The threshold is the QUANTILE of the distances from held-out real images, features [h, d], to the nearest training image;
    where there are none (None), of those from training images to the nearest other one, which are distributed alike unless the
    extractor was trained on these images and overfits them. Duplicates of training images are excluded, as they would
    lower the threshold."""
    distances = nearest_neighbors(features, 1)[0][:, 0] if held_out is None else nearest_of(held_out, features)[0]
    new = distances[distances > DUPLICATE * features.var(0).sum()]
    return TrainingSet(data, features, float(np.quantile(new.numpy(), QUANTILE)) if len(new) else 0.0)


def closest(distances: Tensor, positions: Tensor, threshold: float) -> Closest:
    """The PAIRS samples nearest to a training image, of squared distances [n] to the training images at positions [n]."""
    order = distances.argsort(stable=True)[:PAIRS]
    ratios = (distances[order] / max(threshold, 1e-30)).sqrt()
    return Closest(order.tolist(), positions[order].tolist(), ratios.tolist())
