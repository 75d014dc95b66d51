"""The source distribution at t = 0: Gaussian noise or the samples of a data set."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Protocol

from torch import Tensor

from flow.noise import gaussian_noise, generators

GAUSSIAN = "gaussian"  # the name of the default
TRAINING_STREAMS = ("train", "pairs")  # which draw from the training samples at random


class Source(Protocol):
    """The distribution of x0."""

    @property
    def name(self) -> str:
        """GAUSSIAN, or what error messages call it."""

    def draw(self, stream: str, seed: int, positions: Iterable[int], shape: tuple[int, ...]) -> Tensor:
        """Samples x0 [n, *shape], float32, on the CPU; row i is a function of (stream, seed, positions[i]) alone."""


class Samples(Protocol):
    """A data set as a flow sees it."""

    def __len__(self) -> int: ...

    def read(self, indices: list[int]) -> Tensor:
        """[n, ...], float32: images in [-1, 1] or points."""

    def fingerprint(self) -> str:
        """Hash of the content."""

    def mismatch(self, data: Any) -> str | None:
        """Why sample k is not that of image k of a data set of the same length, by their names; None where nothing says so."""


class GaussianSource:
    """Standard normal noise."""

    name = GAUSSIAN

    def draw(self, stream: str, seed: int, positions: Iterable[int], shape: tuple[int, ...]) -> Tensor:
        """As Source.draw."""
        return gaussian_noise(stream, seed, positions, shape)


@dataclass
class OrderedSource:
    """Samples in their order: image k starts at sample k mod N."""

    samples: Samples
    name: str

    def draw(self, stream: str, seed: int, positions: Iterable[int], shape: tuple[int, ...]) -> Tensor:
        """As Source.draw. Raises ValueError for samples of another shape."""
        x0 = self.samples.read([p % len(self.samples) for p in positions])
        if tuple(x0.shape[1:]) != tuple(shape):
            raise ValueError(f"{self.name}: has samples of {tuple(x0.shape[1:])}, the flow works on {tuple(shape)}")
        return x0


@dataclass
class DataSource:
    """A data set. Training and pairs draw from its training samples at random; everything else takes the held-out ones in their
    order. Each of the two is read at its first use.
    """

    name: str
    read_training: Callable[[], Samples]
    read_held_out: Callable[[], Samples]
    args: dict[str, Any] = field(default_factory=dict)  # of the data set

    @cached_property
    def training(self) -> OrderedSource:
        return OrderedSource(self.read_training(), self.name)

    @cached_property
    def held_out(self) -> OrderedSource:
        return OrderedSource(self.read_held_out(), self.name)

    def draw(self, stream: str, seed: int, positions: Iterable[int], shape: tuple[int, ...]) -> Tensor:
        """As Source.draw. Raises ValueError for samples of another shape, and what reading them raises."""
        if stream not in TRAINING_STREAMS:
            return self.held_out.draw(stream, seed, positions, shape)
        n = len(self.training.samples)
        drawn = [int(g.integers(n)) for g in generators("source", stream, seed, positions=positions)]
        return self.training.draw(stream, seed, drawn, shape)
