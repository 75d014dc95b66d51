"""Minibatch optimal transport."""

from collections.abc import Sequence

import torch
from torch import Tensor

from flow.couplings.base import Coupling
from flow.source import Source


class OTCoupling(Coupling):
    """Source samples and images of a batch paired to minimize the sum of squared distances (Pooladian et al. 2023,
    arXiv:2304.14772; Tong et al. 2024, arXiv:2302.00482): minibatch optimal transport with an exact assignment.

    Within blocks of consecutive rows, so that the pairs are the same for any number of processes, and, where labels are
    given, within a class: with pairs across classes the noise would depend on the class, and guidance would fail.
    """

    needs_data = True

    def __init__(self, source: Source, seed: int, image_shape: tuple[int, ...], rows: int, block: int = 64):
        """rows: size of a micro-batch. block: number of rows that are paired at once.

        Raises ValueError for a block of less than 2 rows, and for a micro-batch that it does not divide.
        """
        if block != int(block) or block < 2:
            raise ValueError(f"block={block}: must be a whole number of at least 2")
        if rows < 2:
            raise ValueError("needs at least 2 rows in a micro-batch, here it is 1; use a larger train.batch_size")
        if rows % block:
            fits = max((size for size in range(2, min(rows, int(block)) + 1) if rows % size == 0), default=rows)
            raise ValueError(
                f"block={block}: must divide the {rows} rows that a process takes at once; set flow.coupling_args.block={fits}"
            )
        self.source, self.seed, self.image_shape, self.block = source, seed, image_shape, block
        self.note = f"matches samples within blocks of {block} of each batch"

    def sample_x0(self, sample_ids: Sequence[int], indices: Sequence[int], x1: Tensor, y: Tensor | None) -> Tensor:
        """As Coupling.sample_x0, for a multiple of `block` samples."""
        from scipy.optimize import linear_sum_assignment

        x0 = self.source.draw("train", self.seed, sample_ids, self.image_shape)
        a, b = x0.flatten(1), x1.flatten(1)
        groups = torch.arange(len(b)) // self.block
        if y is not None:
            groups = groups * (int(y.max()) + 1) + y
        paired = torch.empty_like(x0)
        for group in groups.unique():
            rows = (groups == group).nonzero()[:, 0]
            # |a|^2 + |b|^2 - 2ab, of which only the products depend on the assignment
            rows_x0, rows_x1 = linear_sum_assignment((a[rows] @ b[rows].T).numpy(), maximize=True)
            paired[rows[rows_x1]] = x0[rows[rows_x0]]
        return paired
