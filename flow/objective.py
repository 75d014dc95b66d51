"""What training minimises, by name."""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from flow import registry
from flow.distill import distillation_loss
from flow.loss import Distance, flow_matching_loss
from flow.path import LinearPath

OBJECTIVES: dict[str, Callable[..., Tensor]] = {"flow_matching": flow_matching_loss, "distillation": distillation_loss}


def objective(name: str, distance: Distance, **args: float) -> Callable[..., Tensor]:
    """objective(net, path, x0, x1, t, y) -> loss per sample [B].

    Raises ValueError for an unknown name or argument and for a value out of range.
    """
    chosen = partial(registry.pick("objective", OBJECTIVES, name, args), distance=distance)
    one = torch.zeros(1, 1)
    chosen(lambda x, t, y: x, LinearPath(), one, one, torch.zeros(1))  # checks the values
    return chosen
