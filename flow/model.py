"""A network with what has to be known to make velocities of it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from flow.guidance import condition_defaults
from flow.path import Path


class Network(Protocol):
    """What the engine asks of a network; those of `models` answer."""

    num_classes: int | None  # for labels
    max_prompt_bytes: int | None  # for prompts, read as tokens
    null: int | None  # the y that stands for no condition

    def __call__(self, x: Tensor, t: Tensor, y: Tensor | None = None) -> Tensor: ...

    def encode(self, prompts: Sequence[str]) -> Tensor: ...

    def eval(self) -> Any: ...


@dataclass
class FlowModel:
    """A network and what has to be known to make velocities of it."""

    net: Network
    path: Path  # of its training
    prediction: str = "velocity"  # one of path.PREDICTIONS
    decode: Callable[[Tensor], Tensor] | None = None  # of a flow on latents: from the end of the flow to images in [-1, 1]

    def __post_init__(self):
        """A network that says nothing of labels or prompts has none; the null label is `num_classes`."""
        for name, value in condition_defaults(self.net).items():
            setattr(self.net, name, value)
