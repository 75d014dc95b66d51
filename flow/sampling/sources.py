"""Sources that are data sets: those of a configuration, of --source, and tensors."""

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import datasets
from datasets import DataSet
from datasets.images import Images, to_float
from flow.model import FlowModel
from flow.runtime.errors import error_context
from flow.source import GAUSSIAN, DataSource, GaussianSource, OrderedSource, Source


@dataclass
class DataSamples:
    """Implements `flow.source.Samples` for a data set of images or points."""

    data: DataSet

    def __len__(self) -> int:
        return len(self.data)

    def read(self, indices: list[int]) -> Tensor:
        """[n, ...], float32: images in [-1, 1] or points."""
        return to_float(torch.stack([self.data[k][0] for k in indices]))


def build(name: str, root: str | None, args: dict[str, Any]) -> Source:
    """The source `name`: "gaussian", which takes no arguments, or a data set, whose held-out samples are the other split, new
    points of a toy, or the set itself where there is nothing else.

    Raises ValueError for arguments of gaussian; a data set is looked at when it is needed first.
    """
    if name == GAUSSIAN:
        if args:
            raise ValueError(f"args={args}: gaussian takes none")
        return GaussianSource()
    own = {"name": name, "root": root, "args": args}
    return DataSource(name, partial(_read, own), partial(_read_held_out, own))


def given(x0: Tensor, name: str = "x0") -> OrderedSource:
    """These samples [N, ...]: uint8 images, or floats as networks see them."""
    return OrderedSource(DataSamples(Images(x0.cpu(), None, ())), name)


def replace_by(model: FlowModel, text: str | None, root: str | None, shape: tuple[int, ...]) -> None:
    """Give the model, which works on this shape, the samples that --source names, in their order: a data set (NAME, NAME:train,
    NAME:test) or a folder of images, which are resized. Without --source nothing changes.

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
            samples = _read({"name": split[0], "root": root, "args": split[1]})
        elif Path(text).is_dir() and len(shape) == 3:
            samples = _read({"name": "folder", "root": None, "args": {"path": text, "size": shape[1], "channels": shape[0]}})
        else:
            raise ValueError(f"{text}: must be a folder of images or one of {', '.join(datasets.DATASETS)}")
        model.source = OrderedSource(samples, text)
        model.source.draw("sample", 0, [0], shape)


def _read(own: dict[str, Any]) -> DataSamples:
    """The data set {"name": ..., "root": ..., "args": ...}. Raises ValueError for latents."""
    data = datasets.build(**own)
    if data.codec is not None:
        raise ValueError(f"{own['name']}: are latents; a source has pixels or points")
    return DataSamples(data)


def _read_held_out(own: dict[str, Any]) -> DataSamples:
    other = datasets.held_out(own)
    return _read(other[1] if other else own)
