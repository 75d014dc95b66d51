"""Label dropout in training; classifier-free guidance, autoguidance and guidance intervals in sampling."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from flow.model import FlowModel
from flow.noise import generator
from flow.path import LinearPath, broadcast_over

MIN_NOISE_PREDICTION_TIME = 0.01


def drop_labels(y: Tensor, rows: slice, seed: int, step: int, batch_size: int, probability: float, null: int) -> Tensor:
    """y [b] or [b, L], the given rows of the global batch, each replaced by `null` with `probability` on its own.

    Joint training of the conditional and the unconditional model (Ho & Salimans 2022, arXiv:2207.12598, algorithm 1).
    The choice is a function of (seed, step, row).
    """
    u = generator("label dropout", seed, step).random(batch_size)[rows]
    dropped = torch.from_numpy(u < probability).to(y.device, non_blocking=y.is_cuda)
    return torch.where(broadcast_over(dropped, y), null, y)


def network_calls(scale: float) -> int:
    """Network calls per image of an evaluation with classifier-free guidance.

    v_u + w (v_c - v_u) is one of the two velocities where the scale w is 0 or 1.
    """
    return 1 if scale in (0, 1) else 2


class GuidedVelocity:
    """A network as the velocity of a solver, on the linear path, with guidance.

    Without a guide that is classifier-free guidance, v_u + w (v_c - v_u) of the velocities without and with the labels (Ho &
    Salimans 2022, arXiv:2207.12598, eq. 6, with scale w = 1 + their w): w = 1 is off, w = 0 ignores the labels. Both halves go
    through the network as one batch. With a guide it is autoguidance, v_g + w (v_c - v_g), where v_g is the velocity of the
    guide, a weaker model, with the same labels (Karras et al. 2024, arXiv:2406.02507, eq. 3). Outside of the interval of t the
    velocity is v_c alone (Kynkaanniemi et al. 2024, arXiv:2404.07724); the interval is checked at each stage of a solver.

    `forwards` counts network calls per image, those of the guide included.

    What a network's `encode_condition` makes of the labels or prompts is computed once and kept, but while torch records
    gradients: so make a new object where the weights change.

    A network of another path or prediction is evaluated at the point of its own path that corresponds to (x, t), see
    `flow/path.py`, and its prediction is converted to x1 - x0. Guidance of either is the same, as the conversion is affine.
    """

    def __init__(
        self, model: FlowModel | Callable[..., Tensor], y: Tensor | None = None, null: int | None = None,
        scale: float | Tensor = 1.0, interval: tuple[float, float] = (0.0, 1.0), guide: "GuidedVelocity | None" = None,
    ):  # fmt: skip
        """model: with a bare network the path is linear and the prediction the velocity. y: labels [B], tokens [B, L] or None
        for an unconditional network; `null` is needed where y is given. scale: a number, or a scalar tensor. interval: of the
        solver's t, both ends included. guide: with its own labels and scale 1."""
        self.net: Callable[..., Tensor] = model.net if isinstance(model, FlowModel) else model
        self.path = model.path if isinstance(model, FlowModel) else LinearPath()
        self.prediction = model.prediction if isinstance(model, FlowModel) else "velocity"
        self.scale, self.interval, self.guide = scale, interval, guide
        self.y = {"conditional": y}
        if y is not None and null is not None:
            y_null = torch.full_like(y, null)
            self.y |= {"unconditional": y_null, "both": torch.cat([y, y_null])}
        self.encoded: dict[str, Any] = {}
        self.forwards = 0
        has_float64 = isinstance(self.net, nn.Module) and any(p.dtype == torch.float64 for p in self.net.parameters())
        self.dtype = torch.float64 if has_float64 else torch.float32

    def __call__(self, x: Tensor, t: float, t_next: float | None = None) -> Tensor:
        """Velocity [B, ...] at x [B, ...] and t in [0, 1), in the dtype of x; the network computes in its own.

        t_next: for networks with two times, the time that their mean velocity leads to; default t.
        """
        t_next = t if t_next is None else t_next
        scale = self.scale if self.interval[0] <= t <= self.interval[1] else 1.0
        if self.guide is None or scale == 1:
            return self._velocity(x, t, t_next, scale)
        before = self.guide.forwards
        v_g = self.guide(x, t, t_next)
        self.forwards += self.guide.forwards - before
        return v_g + scale * (self._velocity(x, t, t_next, 1.0) - v_g)

    def _velocity(self, x: Tensor, t: float, t_next: float, scale: float | Tensor) -> Tensor:
        """The network's own velocity, with classifier-free guidance of this scale."""
        if isinstance(self.path, LinearPath) and self.prediction == "velocity":
            return self._cfg(x.to(self.dtype), t, t_next, scale).to(x.dtype)
        # x_t is independent of the data where alpha = 0: a network that predicts noise is evaluated a little later
        t_net = max(self.path.t_from_linear(t), MIN_NOISE_PREDICTION_TIME if self.prediction == "noise" else 0.0)
        t_net = min(t_net, self.path.t_max)  # the last time of its training
        times = torch.full((x.shape[0],), t_net, device=x.device, dtype=x.dtype)
        alpha, sigma, *_ = self.path.coefficients(times[:1])
        x_net = x * broadcast_over(alpha + sigma, x)
        prediction = self._cfg(x_net.to(self.dtype), t_net, t_net, scale).to(x.dtype)
        x0, x1 = self.path.predict_x0_x1(x_net, times, prediction, self.prediction)
        return x1 - x0

    def _cfg(self, x: Tensor, t: float, t_next: float, scale: float | Tensor) -> Tensor:
        """The network's prediction at x and its own time t, guided."""
        fixed = not isinstance(scale, Tensor)  # a tensor is an input of an exported graph: no branch depends on its value
        if self.y["conditional"] is None or (fixed and scale == 1):
            return self._forward(x, t, t_next, "conditional")
        if fixed and scale == 0:
            return self._forward(x, t, t_next, "unconditional")
        both = self._forward(torch.cat([x, x]), t, t_next, "both", calls=2)
        v_c, v_u = both.unflatten(0, (2, x.shape[0]))
        return v_u + scale * (v_c - v_u)

    def _forward(self, x: Tensor, t: float, t_next: float, which: str, calls: int = 1) -> Tensor:
        """The network at x with these labels, as so many calls per image."""
        self.forwards += calls
        y = self._condition(which)
        times = [torch.full((x.shape[0],), time, device=x.device, dtype=self.dtype) for time in (t, t_next)]
        if getattr(self.net, "two_times", False):
            return self.net(x, times[0], y, times[1]).to(self.dtype)
        return self.net(x, times[0], y).to(self.dtype)

    def _condition(self, which: str) -> Any:
        """These labels as the network takes them."""
        y, encode = self.y[which], getattr(self.net, "encode_condition", None)
        if y is None or encode is None or torch.is_grad_enabled():  # a graph serves one backward pass
            return y
        if which not in self.encoded:
            self.encoded[which] = encode(y)
        return self.encoded[which]
