"""Where a flow starts at t = 0: Gaussian noise, or a data set whose samples it transfers."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

import datasets
from datasets import DataSet
from datasets.images import to_float
from flow.noise import gaussian_noise, generator
from flow.runtime.errors import error_context

GAUSSIAN = "gaussian"  # the name of the default
TRAINING_STREAMS = ("train", "pairs")  # in which source samples may repeat


class Source(Protocol):
    """The distribution of x0."""

    @property
    def name(self) -> str:
        """GAUSSIAN, or what error messages call it."""

    def draw(self, stream: str, seed: int, positions: Iterable[int], shape: tuple[int, ...]) -> Tensor:
        """Samples x0 [n, *shape], float32, on the CPU; row i is a function of (stream, seed, positions[i]) alone."""


class GaussianSource:
    """Standard normal noise."""

    name = GAUSSIAN

    def draw(self, stream: str, seed: int, positions: Iterable[int], shape: tuple[int, ...]) -> Tensor:
        """As Source.draw."""
        return gaussian_noise(stream, seed, positions, shape)


@dataclass
class DataSource:
    """A data set. Training and pairs draw from it at random; everything else takes held-out samples in their order, from the
    first again after the last: the other split, new points of a toy, or the set itself where there is nothing else.
    """

    data_set: str  # a key of datasets.DATASETS
    root: str | None = None
    args: dict[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return self.data_set

    @cached_property
    def training(self) -> DataSet:
        """Raises as datasets.build does, and ValueError for latents."""
        return _build(self.data_set, self.root, self.args)

    @cached_property
    def held_out(self) -> DataSet:
        """Raises as datasets.build does, and ValueError for latents."""
        other = datasets.held_out({"name": self.data_set, "root": self.root, "args": self.args})
        return _build(**other[1]) if other else self.training

    def draw(self, stream: str, seed: int, positions: Iterable[int], shape: tuple[int, ...]) -> Tensor:
        """As Source.draw. Raises ValueError for a data set of another shape."""
        positions = list(positions)
        if stream not in TRAINING_STREAMS:
            return OrderedSource(self.held_out, self.name).draw(stream, seed, positions, shape)
        n = len(self.training)
        return _read(self.training, [int(generator("source", stream, seed, p).integers(n)) for p in positions], shape)


@dataclass
class OrderedSource:
    """The samples of a data set in their order: image k starts at sample k mod N."""

    data: DataSet
    name: str

    def draw(self, stream: str, seed: int, positions: Iterable[int], shape: tuple[int, ...]) -> Tensor:
        """As Source.draw. Raises ValueError for a data set of another shape."""
        return _read(self.data, [p % len(self.data) for p in positions], shape)


def build(name: str, root: str | None, args: dict[str, Any]) -> Source:
    """The source `name`: "gaussian", which takes no arguments, or a data set, which is read when it is needed first."""
    if name != GAUSSIAN:
        return DataSource(name, root, args)
    if args:
        raise ValueError(f"args={args}: gaussian takes none")
    return GaussianSource()


def replace_by(model: Any, text: str | None, root: str | None, shape: tuple[int, ...]) -> None:
    """Give the FlowModel, which works on this shape, the samples that --source names, in their order: a data set (NAME,
    NAME:train, NAME:test) or a folder of images, which are resized. Without --source nothing changes.

    Raises:
        UserError: for what is neither, and where the flow starts at noise.
    """
    if text is None:
        return
    with error_context("--source"):
        if model.source.name == GAUSSIAN:
            raise ValueError(f"{text}: this flow starts at Gaussian noise; flow.source of its training makes it start at data")
        split = datasets.named_split(text)
        if split:
            data = _build(split[0], root, split[1])
        elif Path(text).is_dir() and len(shape) == 3:
            data = _build("folder", None, {"path": text, "size": shape[1], "channels": shape[0]})
        else:
            raise ValueError(f"{text}: must be a folder of images or one of {', '.join(datasets.DATASETS)}")
        _check_shape(text, data.image_shape, shape)
        model.source = OrderedSource(data, text)


def _build(name: str, root: str | Path | None, args: dict[str, Any]) -> DataSet:
    data = datasets.build(name, root, args)
    if data.codec is not None:
        raise ValueError(f"{name}: are latents; a source has pixels or points")
    return data


def _read(data: DataSet, indices: list[int], shape: tuple[int, ...]) -> Tensor:
    _check_shape("the source", data.image_shape, shape)
    return to_float(torch.stack([data[k][0] for k in indices]))


def _check_shape(name: str, actual: tuple[int, ...], expected: tuple[int, ...]) -> None:
    if actual != tuple(expected):
        raise ValueError(f"{name}: has samples of {actual}, the flow works on {tuple(expected)}")
