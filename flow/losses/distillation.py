"""Distillation of a rectified flow into one step, or a few."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from flow.losses.flow_matching import FlowMatching


@dataclass(kw_only=True)
class Distillation(FlowMatching):
    """Flow matching at the times that N Euler steps evaluate, on the pairs (x0, x1) of a flow.

    With steps = 1 all times are 0, and x0 + net(x0, 0, y) learns to be x1, the end of the teacher's flow (Liu et al. 2023,
    arXiv:2209.03003, paragraph "Distillation"). With N steps the network learns the times 0, 1/N, ..., (N - 1)/N and forgets
    those between, unless a share of the batch goes to flow matching at all times.
    """

    name: ClassVar[str] = "distillation"
    needs_pairs: ClassVar[bool] = True
    capturable: ClassVar[bool] = True

    steps: int = 1  # Euler steps of the student
    flow_share: float = 0.0  # share of the batch, in [0, 1), for flow matching at all times

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.prediction == "noise":
            # At t = 0 the input is x0 (on the VP path x0 + 0.0066 x1). The target equals it, so the identity has zero loss
            # (4e-5) without any knowledge of x1.
            raise ValueError(
                "distillation: flow.prediction=noise has nothing to learn at t = 0, where the input is the noise; "
                "use velocity or data"
            )
        self.check("steps", self.steps >= 1 and self.steps == int(self.steps), "a whole number of at least 1")
        self.check("flow_share", 0 <= self.flow_share < 1, "0 or more and less than 1")

    @property
    def uses_time_sampler(self) -> bool:
        return self.flow_share > 0

    def times(self, u: Tensor) -> Tensor:
        """The times [b], float32, of uniforms u [b]: below `flow_share` those of flow.time_sampler, above it the times 0, 1/N,
        ..., (N - 1)/N of N Euler steps, in equal numbers."""
        spread = (u - self.flow_share) / (1 - self.flow_share)
        t = (spread * self.steps).floor().clamp(0, self.steps - 1) / self.steps
        if self.flow_share:
            is_flow = u < self.flow_share
            inside = torch.where(is_flow, u / self.flow_share, 0.5)  # 0.5 stands in where no time is drawn
            t = torch.where(is_flow, self.time_sampler(inside), t)
        return t.float()
