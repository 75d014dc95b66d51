"""Nearest neighbors among features, in blocks of distances of bounded size."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from flow.evaluation.intervals import JACKKNIFE_BLOCKS, block_of

BLOCK = 4096  # rows and columns of a block of distances: 64 MiB in float32
PRECISION_NEIGHBORS, DENSITY_NEIGHBORS = 3, 5  # as in the papers
SPARE_NEIGHBORS = 4  # that take the place of those in a block that is left out
Advance = Callable[[], object]  # called after each block of distances


@dataclass
class Neighborhoods:
    """Which samples lie in the k-NN balls of real images, and which real images in those of samples.

    The k-NN ball of a point is centered on it and reaches to its k-th nearest neighbor in its own set, itself not counted.
    n samples and m real images; J = JACKKNIFE_BLOCKS blocks of the samples (`block_of`), each left out in turn.
    """

    precise: Tensor  # bool [n]: in the 3-NN ball of a real image, its border included
    dense: Tensor  # int64 [n]: the number of 5-NN balls of real images that hold the sample, borders excluded
    covered: Tensor  # bool [m]: the 5-NN ball of the real image holds a sample
    coverage_left_out: np.ndarray  # [J], the share of those without the samples of each block
    recalled: Tensor | None = None  # bool [m]: the real image lies in the 3-NN ball of a sample; None: not computed
    recall_left_out: np.ndarray | None = None  # [J]


def compare(
    samples: Tensor, real: Tensor, real_neighbors: Tensor, recall: bool = True, advance: Advance = lambda: None
) -> Neighborhoods:
    """The neighborhoods of features [n, d] and real ones [m, d], each distance between the two computed once.

    Distances are float32, a block of BLOCK x BLOCK at a time, with less than 0.5 GB beside the features. Borders count as in
    the code of the two papers: for precision and recall, not for density and coverage.

    Args:
        real_neighbors: the distances of `nearest_neighbors` of the real ones, [m, 5].
        recall: whether to compute the balls of the samples, too.
    """
    n, m = len(samples), len(real)
    block = torch.from_numpy(block_of(np.arange(n), JACKKNIFE_BLOCKS))
    radii = _radii(samples, block, advance) if recall else None
    precise, dense = torch.zeros(n, dtype=torch.bool), torch.zeros(n, dtype=torch.int64)
    covered, recalled, regained = (torch.zeros(JACKKNIFE_BLOCKS, m, dtype=torch.bool) for _ in range(3))
    small, large = real_neighbors[:, PRECISION_NEIGHBORS - 1], real_neighbors[:, DENSITY_NEIGHBORS - 1]
    center = _center(real)
    for rows in _blocks(n):
        a = samples[rows] - center
        members = [(block[rows] == j).nonzero()[:, 0] for j in range(JACKKNIFE_BLOCKS)]
        for columns in _blocks(m):
            squared = _squared_distances(a, real[columns] - center)
            precise[rows] |= (squared <= small[columns]).any(1)
            inside = squared < large[columns]
            dense[rows] += inside.sum(1)
            reached = squared <= radii[0][rows, None] if radii else inside
            for j, member in enumerate(members):
                covered[j, columns] |= inside[member].any(0)
                if radii:
                    recalled[j, columns] |= reached[member].any(0)
                    wider = (radii[1][rows, j] > radii[0][rows]).nonzero()[:, 0]
                    regained[j, columns] |= (squared[wider] <= radii[1][rows, j][wider, None]).any(0)
            advance()
    result = Neighborhoods(precise, dense, covered.any(0), _left_out(covered, torch.zeros_like(covered)))
    if radii:
        result.recalled, result.recall_left_out = recalled.any(0), _left_out(recalled, regained)
    return result


def _radii(samples: Tensor, block: Tensor, advance: Advance) -> tuple[Tensor, Tensor]:
    """Squared radii [n] of the balls of 3, and [n, J] those without the samples of block j: 0 for these samples."""
    distance, position = nearest_neighbors(samples, PRECISION_NEIGHBORS + SPARE_NEIGHBORS, advance)
    without = []
    for j in range(JACKKNIFE_BLOCKS):
        others = distance.masked_fill(block[position] == j, torch.inf).sort(dim=1).values[:, PRECISION_NEIGHBORS - 1]
        others = torch.where(others.isinf(), distance[:, -1], others)  # that far at least
        without.append(others.masked_fill(block == j, 0))
    return distance[:, PRECISION_NEIGHBORS - 1], torch.stack(without, dim=1)


def _left_out(hits: Tensor, regained: Tensor) -> np.ndarray:
    """Share [J] of real images that the samples reach without those of block j: by another block (hits [J, m]), or by a ball
    that is wider without it (regained [J, m])."""
    blocks = hits.sum(0)
    others = blocks - hits.long() > 0
    return (others | regained).double().mean(1).numpy()


def nearest_neighbors(features: Tensor, k: int, advance: Advance = lambda: None) -> tuple[Tensor, Tensor]:
    """(squared distance, position) [n, k] of the k nearest neighbors of each of the features [n, d] among the others, in
    order; infinitely far where there are fewer."""
    distance, position = torch.full((len(features), k), torch.inf), torch.zeros(len(features), k, dtype=torch.int64)
    center = _center(features)

    def update(rows: slice, squared: Tensor, start: int) -> None:
        block, index = squared.topk(min(k, squared.shape[1]), largest=False)
        distances, positions = torch.cat([distance[rows], block], dim=1), torch.cat([position[rows], index + start], dim=1)
        distance[rows], order = distances.topk(k, largest=False)
        position[rows] = positions.gather(1, order)

    blocks = _blocks(len(features))
    for i, rows in enumerate(blocks):
        a = features[rows] - center
        for columns in blocks[i:]:
            squared = _squared_distances(a, features[columns] - center)
            if columns == rows:
                squared.fill_diagonal_(torch.inf)
            else:
                update(columns, squared.T.contiguous(), rows.start)
            update(rows, squared, columns.start)
            advance()
    return distance, position


def nearest_of(features: Tensor, others: Tensor, advance: Advance = lambda: None) -> tuple[Tensor, Tensor]:
    """(squared distance [n], position [n]) of the nearest of the others [m, d] to each of the features [n, d]."""
    distance, position = torch.full((len(features),), torch.inf), torch.zeros(len(features), dtype=torch.int64)
    center = _center(others)
    for rows in _blocks(len(features)):
        a = features[rows] - center
        for columns in _blocks(len(others)):
            block, index = _squared_distances(a, others[columns] - center).min(1)
            position[rows] = torch.where(block < distance[rows], index + columns.start, position[rows])
            distance[rows] = torch.minimum(distance[rows], block)
            advance()
    return distance, position


def num_blocks(n: int, m: int | None = None) -> int:
    """Blocks of distances within a set of n, or between sets of n and m."""
    rows = len(_blocks(n))
    return rows * (rows + 1) // 2 if m is None else rows * len(_blocks(m))


def _center(features: Tensor) -> Tensor:
    """A point among the features: distances that are computed from the origin would round more."""
    return features[:BLOCK].mean(0)


def _blocks(n: int) -> list[slice]:
    return [slice(i, min(i + BLOCK, n)) for i in range(0, n, BLOCK)]


def _squared_distances(a: Tensor, b: Tensor) -> Tensor:
    """|a - b|^2 of features [n, d] and [m, d]: [n, m]."""
    squared = torch.addmm(b.square().sum(1), a, b.T, alpha=-2)
    return squared.add_(a.square().sum(1, keepdim=True)).clamp_(min=0)
