"""Inputs and outputs of a training loss, and the registry of losses."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol

from torch import Tensor

PASSES = 3.0  # of flow matching: one forward, a backward pass counts as two


@dataclass
class Batch:
    """One micro-batch of one process: a function of (seed, step, rows) alone.

    Tensors are on the device of the network. `sample_ids` are the positions of the samples in the stream of training images.
    """

    x1: Tensor  # data [b, ...]: images in [-1, 1], latents or points
    x0: Tensor | None  # source samples [b, ...], coupled with x1
    y: Tensor | None  # labels [b] or prompt tokens [b, L]
    uniforms: Tensor | None  # stratified uniforms in (0, 1), float64 [b, num_uniforms]
    step: int  # 0 for the first
    rows: slice  # of the global batch
    sample_ids: range
    indices: list[int]  # of the data set
    noise: dict[str, Tensor] = field(default_factory=dict)  # standard normal [b, *shape] for each key of the loss's `draws`
    progress: float = 0.0  # the share of the training that is done, step / train.steps
    states: Tensor | None = None  # [b, K, ...], float16: states of a teacher's path from x0 to x1, between the two
    state_times: tuple[float, ...] | None = None  # of the K states, in (0, 1), rising


@dataclass
class Losses:
    """What a loss gives back."""

    per_sample: Tensor  # [b], float32; training minimizes its mean
    t: Tensor | None = None  # [b], the times of the samples, for the log
    terms: dict[str, Tensor] = field(default_factory=dict)  # unweighted parts [b] by name, for the log


class Eager(Protocol):
    """The network without DDP and without a gradient, for targets, in float32 and not compiled except in `as_trained`.

    A call on the rows of the training pass replays its dropout masks. A call on fewer rows draws other masks.
    """

    null: int | None  # the y that stands for no condition

    def __call__(self, x: Tensor, t: Tensor, y: Tensor | None = None, t_next: Tensor | None = None) -> Tensor: ...

    def as_trained(self, x: Tensor, t: Tensor, y: Tensor | None = None, t_next: Tensor | None = None) -> Tensor:
        """The output in the precision of the training pass (its autocast, its compilation), as float32.

        For targets that are compared with the prediction: both have the same rounding errors. Where a small difference of two
        outputs is taken, call the network in float32 (`__call__`).
        """

    def jvp(self, x: Tensor, t: Tensor, y: Tensor | None, t_next: Tensor | None, v: Tensor, precision: str = "no") -> Tensor:
        """du/dt [b, ...], the derivative of the output u at (x, t) along dx/dt = v [b, ...]; t_next stays fixed."""

    def difference(self, x: Tensor, t: Tensor, y: Tensor | None, t_next: Tensor | None, v: Tensor) -> Tensor:
        """The same by a central difference over a short time."""


class Loss(Protocol):
    """A training loss. It is stateless: a schedule is a function of `batch.step` or `batch.progress`."""

    @property
    def capturable(self) -> bool:
        """By a CUDA graph: the same operations in each step, on x1, x0, y, uniforms and noise alone, without eager."""

    def __call__(self, net: Callable[..., Any], eager: Eager, batch: Batch) -> Losses: ...


class FlowLoss(ABC):
    """Base of the losses that a configuration can name; a subclass registers itself as `name`.

    Args of the constructor come from the configuration: `path`, `prediction` and `time_sampler` from its flow section, all
    others from `loss.args`.
    """

    name: ClassVar[str]
    num_uniforms: ClassVar[int] = 1  # stratified uniforms that a sample needs
    draws: ClassVar[dict[str, tuple[int, ...]]] = {}  # further standard normal noise by key, with the shape for a sample
    needs_two_times: ClassVar[bool] = False  # of the network: it is a flow map
    needs_derivative: ClassVar[bool] = False  # calls eager.jvp or eager.difference
    needs_states: ClassVar[bool] = False  # reads batch.states
    needs_pairs: ClassVar[bool] = False  # made by a flow: from independent ones it would learn the mean image
    capturable: ClassVar[bool] = False

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        cls.capturable = cls.__dict__.get("capturable", False)  # not inherited: a subclass may read more of the batch
        if "name" in cls.__dict__:  # others are bases of losses
            other = LOSSES.get(cls.name)
            if other and other.__module__ != cls.__module__:
                raise TypeError(f"{cls.__module__}: the loss {cls.name!r} exists already, in {other.__module__}")
            LOSSES[cls.name] = cls

    @property
    def uses_time_sampler(self) -> bool:
        """Whether flow.time_sampler has an effect."""
        return True

    @property
    def passes(self) -> float:
        """Passes through the network that a sample costs."""
        return PASSES

    def check(self, key: str, holds: bool, rule: str) -> None:
        """Raises ValueError that names the argument `key` and the rule where the rule does not hold."""
        if not holds:
            raise ValueError(f"{key}={getattr(self, key)!r}: must be {rule}")

    @abstractmethod
    def __call__(self, net: Callable[..., Any], eager: Eager, batch: Batch) -> Losses: ...


LOSSES: dict[str, type[FlowLoss]] = {}
