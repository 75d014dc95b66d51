"""Training losses by name."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from flow import registry
from flow.losses.distances import Distance
from flow.losses.distillation import discretize_times, distillation_loss
from flow.losses.flow_matching import flow_matching_loss
from flow.path import PREDICTIONS


def drawn_times(t: Tensor) -> Tensor:
    return t


@dataclass
class Objective:
    loss: Callable[..., Tensor]  # (net, path, x0, x1, t, y) -> loss per sample [B]
    times: Callable[[Tensor], Tensor]  # t [B] as drawn -> the times [B] at which `loss` asks the network


# name -> (loss, times); arguments of an objective are those that both take
OBJECTIVES = {"flow_matching": (flow_matching_loss, drawn_times), "distillation": (distillation_loss, discretize_times)}


def objective(name: str, distance: Distance, prediction: str, /, **args: float) -> Objective:
    """Raises ValueError for an unknown name or argument, for a value out of range, and for distillation of a network that
    predicts noise: at t = 0 it is given x0 (on the VP path x0 + 0.0066 x1) and asked for x0, so the identity, which says
    nothing about x1, has a loss of 0 (4e-5). Velocity and data ask for x1 there on every path.
    """
    if prediction not in PREDICTIONS:
        raise ValueError(f"{prediction!r} is no prediction; choose one of {', '.join(PREDICTIONS)}")
    loss, times = (
        registry.pick("objective", {known: pair[i] for known, pair in OBJECTIVES.items()}, name, args) for i in range(2)
    )
    times(torch.zeros(1))  # checks the values
    if name == "distillation" and prediction == "noise":
        raise ValueError(
            "distillation: flow.prediction=noise has nothing to learn at t = 0, where the input is the noise; "
            "use velocity or data"
        )
    return Objective(partial(loss, distance=distance, prediction=prediction), times)
