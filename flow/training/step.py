"""A training step as a function: what it takes and returns."""

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor

from flow.losses import Batch, Losses


class StepOutput(NamedTuple):
    """The losses of the micro-batches, the norm of the gradient, and whether the weights changed."""

    losses: list[Losses]
    grad_norm: Tensor
    updated: bool


Step = Callable[[list[Batch], float | Tensor], StepOutput]  # of the micro-batches and the learning rate
