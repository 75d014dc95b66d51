"""alpha-Flow: a flow map from scratch, from flow matching to MeanFlow without a derivative of the network."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from flow.losses.base import Batch, Eager, Losses
from flow.losses.flow_map import GuidedFlowMapLoss, jump, x_and_velocity
from flow.path import broadcast_over

TEMPERATURE = 25.0  # of the sigmoid, as in the paper's configurations


@dataclass(kw_only=True)
class AlphaFlow(GuidedFlowMapLoss):
    """|u(x, t, s) - sg[alpha v + (1 - alpha) u(w, s', s)]|^2 / alpha at w = x + (s' - t) v, s' = t + alpha (s - t).

    Zhang et al. 2025 (arXiv:2510.20771, section 4), whose time runs the other way. alpha = 1 is flow matching over (t, s); for
    alpha -> 0 the gradient goes to that of MeanFlow. alpha falls from 1 along a sigmoid. The paper ends with alpha = 0, which
    is MeanFlow and needs its derivative; here alpha stays at `alpha_min`, a variant. The target takes one more forward pass of
    the network. As alpha divides the difference of the two, that pass has the precision and the dropout masks of the
    prediction: a target in float32 beside a prediction in bf16 makes the gradient 60% wrong at alpha = 0.005, and a target in
    bf16 10% (docs/few_steps.md).

    Example:
        >>> times = time_samplers.build("logit_normal")
        >>> loss = AlphaFlow(path=LinearPath(), prediction="velocity", time_sampler=times, anneal_end=0.5)
        >>> loss(net, eager, batch).per_sample.mean().backward()
    """

    name: ClassVar[str] = "alpha_flow"

    anneal_start: float = 0.0  # share of the training at which alpha leaves 1
    anneal_end: float = 1.0  # share of the training at which alpha arrives
    alpha_min: float = 0.005  # in (0, 1]; 1 is flow matching for the mean velocity

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check("anneal_start", 0 <= self.anneal_start <= 1, "between 0 and 1, a share of the training")
        self.check("anneal_end", self.anneal_start < self.anneal_end <= 1, "more than anneal_start and at most 1")
        self.check("alpha_min", 0 < self.alpha_min <= 1, "more than 0 and at most 1")

    @property
    def passes(self) -> float:
        """The mean over a training: the target takes one pass more while alpha is less than 1."""
        return super().passes + self.guidance_passes + sum(self.needs_second_pass(k / 1000) for k in range(1000)) / 1000

    def alpha(self, progress: float) -> float:
        """alpha at this share of the training: 1 - sigmoid, set to 1 within `alpha_min` of it, and at least `alpha_min`."""
        phase = (progress - self.anneal_start) / (self.anneal_end - self.anneal_start) - 0.5
        alpha = 1.0 if phase <= -0.5 else 0.0 if phase >= 0.5 else 1 / (1 + math.exp(TEMPERATURE * phase))
        return 1.0 if alpha > 1 - self.alpha_min else max(alpha, self.alpha_min)

    def needs_second_pass(self, progress: float) -> bool:
        """Whether the target takes a pass of the network."""
        return progress >= self.map_start and self.alpha(progress) < 1

    def __call__(self, net: Callable[..., Tensor], eager: Eager, batch: Batch) -> Losses:
        assert batch.uniforms is not None
        t, t_next = self.times(batch.uniforms, batch.progress)
        x, v = x_and_velocity(self.path, batch, t)
        prediction = net(x, t, batch.y, t_next)
        v, alpha = self.guided(eager, x, t, batch.y, v), self.alpha(batch.progress)
        is_map = t_next > t  # for the others alpha is 1
        target = v
        if self.needs_second_pass(batch.progress):
            t_mid = t + alpha * (t_next - t)
            u_next = eager.as_trained(jump(x, t, t_mid, v), t_mid, batch.y, t_next)
            target = torch.where(broadcast_over(is_map, v), alpha * v + (1 - alpha) * u_next, v)
        return self.weighted(prediction, target, t, torch.where(is_map, alpha, 1.0))
