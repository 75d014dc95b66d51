"""Labels or prompts: dropped per sample in training, guided towards in sampling. `net.null` stands for none."""

from collections.abc import Callable

import torch
from torch import Tensor

from flow import rng


def drop_labels(y: Tensor, rows: slice, seed: int, step: int, batch_size: int, probability: float, null: int) -> Tensor:
    """y [b] or [b, L], the given rows of the global batch, each replaced by `null` with `probability` on its own.

    Joint training of the conditional and the unconditional model (Ho & Salimans 2022, arXiv:2207.12598, algorithm 1).
    The choice is a function of (seed, step, row).
    """
    u = rng.generator("label dropout", seed, step).random(batch_size)[rows]
    dropped = torch.from_numpy(u < probability).to(y.device)
    return torch.where(dropped.view(-1, *[1] * (y.dim() - 1)), null, y)


class GuidedVelocity:
    """A network as the `velocity(x, t)` of a solver, with classifier-free guidance: v_u + w (v_c - v_u).

    That is Ho & Salimans 2022 (arXiv:2207.12598, eq. 6) for velocities, with scale w = 1 + their w: w = 1 is off, w = 0
    ignores the labels. Both halves go through the network as one batch. `forwards` counts network evaluations per image.
    """

    def __init__(self, net: Callable[..., Tensor], y: Tensor | None = None, null: int | None = None, scale: float = 1.0):
        """y: labels [B], tokens [B, L] or None for an unconditional network; `null` is needed where y is given."""
        self.net, self.y, self.null, self.scale = net, y, null, scale
        self.forwards = 0

    def __call__(self, x: Tensor, t: float) -> Tensor:
        """Velocity [B, ...] in the dtype of x [B, ...] at the time t in [0, 1]; the network computes in float32 or less."""
        x32 = x.float()
        if self.y is None:
            v = self._forward(x32, t, None)
        elif self.scale == 1:
            v = self._forward(x32, t, self.y)
        elif self.scale == 0:
            v = self._forward(x32, t, torch.full_like(self.y, self.null))
        else:
            labels = torch.cat([self.y, torch.full_like(self.y, self.null)])
            v_c, v_u = self._forward(torch.cat([x32, x32]), t, labels).chunk(2)
            v = v_u + self.scale * (v_c - v_u)
            self.forwards += 1
        self.forwards += 1
        return v.to(x.dtype)

    def _forward(self, x: Tensor, t: float, y: Tensor | None) -> Tensor:
        return self.net(x, torch.full((len(x),), t, device=x.device, dtype=torch.float32), y).float()
