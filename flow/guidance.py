"""Label dropout in training, classifier-free guidance in sampling."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from flow.model import FlowModel
from flow.noise import generator
from flow.path import LinearPath

MIN_NOISE_PREDICTION_TIME = 0.01


def drop_labels(y: Tensor, rows: slice, seed: int, step: int, batch_size: int, probability: float, null: int) -> Tensor:
    """y [b] or [b, L], the given rows of the global batch, each replaced by `null` with `probability` on its own.

    Joint training of the conditional and the unconditional model (Ho & Salimans 2022, arXiv:2207.12598, algorithm 1).
    The choice is a function of (seed, step, row).
    """
    u = generator("label dropout", seed, step).random(batch_size)[rows]
    dropped = torch.from_numpy(u < probability).to(y.device)
    return torch.where(dropped.view(-1, *[1] * (y.dim() - 1)), null, y)


def condition_defaults(net: Any) -> dict[str, int | None]:
    """The attributes of `Network` that `net` lacks, with their defaults. Raises ValueError where no default can be given."""
    if getattr(net, "max_prompt_bytes", None) and not (hasattr(net, "null") and hasattr(net, "encode")):
        raise ValueError(
            f"{type(net).__name__} has max_prompt_bytes: it needs encode(prompts), and null, the token of no prompt"
        )
    defaults = {"num_classes": None, "max_prompt_bytes": None, "null": getattr(net, "num_classes", None)}
    return {name: value for name, value in defaults.items() if not hasattr(net, name)}


class GuidedVelocity:
    """A network as the `velocity(x, t)` of a solver, on the linear path, with classifier-free guidance: v_u + w (v_c - v_u).

    That is Ho & Salimans 2022 (arXiv:2207.12598, eq. 6) for velocities, with scale w = 1 + their w: w = 1 is off, w = 0
    ignores the labels. Both halves go through the network as one batch. `forwards` counts network evaluations per image.

    A network of another path or prediction is asked at the point of its own path that corresponds to (x, t), see
    `flow/path.py`; its answer becomes x1 - x0. Guidance there and guidance here are the same, as the two are affine.
    """

    def __init__(
        self,
        model: FlowModel | Callable[..., Tensor],
        y: Tensor | None = None,
        null: int | None = None,
        scale: float = 1.0,
    ):
        """model: with a bare network the path is linear and the prediction the velocity. y: labels [B], tokens [B, L] or None
        for an unconditional network; `null` is needed where y is given."""
        self.net: Callable[..., Tensor] = model.net if isinstance(model, FlowModel) else model
        self.path = model.path if isinstance(model, FlowModel) else LinearPath()
        self.prediction = model.prediction if isinstance(model, FlowModel) else "velocity"
        self.y, self.null, self.scale = y, null, scale
        self.forwards = 0
        double = isinstance(self.net, nn.Module) and any(p.dtype == torch.float64 for p in self.net.parameters())
        self.dtype = torch.float64 if double else torch.float32

    def __call__(self, x: Tensor, t: float) -> Tensor:
        """Velocity [B, ...] in the dtype of x [B, ...] at the time t in [0, 1); the network computes in its own."""
        if isinstance(self.path, LinearPath) and self.prediction == "velocity":
            return self._guided(x.to(self.dtype), t).to(x.dtype)
        # where alpha is 0 the noise says nothing about the data: a network that predicts noise is asked a little later
        own = max(self.path.time_of(t), MIN_NOISE_PREDICTION_TIME if self.prediction == "noise" else 0.0)
        own = min(own, self.path.t_max)  # the last time of its training
        times = torch.full((len(x),), own, device=x.device, dtype=x.dtype)
        alpha, sigma, *_ = self.path.coefficients(times[:1])
        point = x * (alpha + sigma).view(-1, *[1] * (x.dim() - 1))
        answer = self._guided(point.to(self.dtype), own).to(x.dtype)
        x0, x1 = self.path.endpoints(point, times, answer, self.prediction)
        return x1 - x0

    def _guided(self, x: Tensor, t: float) -> Tensor:
        """What the network says at x at its own time t."""
        self.forwards += 1
        if self.y is None:
            return self._forward(x, t, None)
        if self.scale == 1:
            return self._forward(x, t, self.y)
        assert self.null is not None
        nothing = torch.full_like(self.y, self.null)
        if self.scale == 0:
            return self._forward(x, t, nothing)
        self.forwards += 1
        v_c, v_u = self._forward(torch.cat([x, x]), t, torch.cat([self.y, nothing])).chunk(2)
        return v_u + self.scale * (v_c - v_u)

    def _forward(self, x: Tensor, t: float, y: Tensor | None) -> Tensor:
        return self.net(x, torch.full((len(x),), t, device=x.device, dtype=self.dtype), y).to(self.dtype)
