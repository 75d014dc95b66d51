"""Probability paths between the prior (t = 0) and the data (t = 1)."""

from torch import Tensor


class LinearPath:
    """x_t = t x1 + (1 - t) x0: rectified flow (Liu et al. 2023, arXiv:2209.03003, eq. 1) and the optimal-transport
    conditional path with sigma_min = 0 (Lipman et al. 2023, arXiv:2210.02747, eq. 20)."""

    def interpolate(self, x0: Tensor, x1: Tensor, t: Tensor) -> Tensor:
        """x_t [B, ...] for x0, x1 [B, ...] and t [B] in [0, 1]."""
        t = t.view(-1, *[1] * (x1.dim() - 1))
        return t * x1 + (1 - t) * x0

    def velocity(self, x0: Tensor, x1: Tensor) -> Tensor:
        """dx_t/dt [B, ...] of the pair, the regression target; it does not depend on t."""
        return x1 - x0
