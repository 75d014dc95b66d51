"""Data sets: `build(name, root, args)` gives images and labels: uint8 in memory (`Images`), decoded from files (`Folder`) or
read from the disk (`Packed`), or float16 with the noise that they were made from (`Pairs`), the posteriors of an autoencoder
(`Latents`), or points in place of images (`PointSet`). `data.codec` describes the autoencoder that decodes latents; it is
None for images and points.

`Dataset` and `IterableDataset` below are never instantiated: where the Hugging Face package `datasets` is installed,
accelerate imports these two names from whatever package is called `datasets`, and finds this one.
"""

import hashlib
import inspect
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
from torch import Tensor

from datasets import contract
from datasets.digits import digits
from datasets.folder import folder
from datasets.images import cifar10, fashion_mnist, mnist
from datasets.latents import latents
from datasets.latents import source as latents_source
from datasets.packed import packed
from datasets.pairs import pairs
from datasets.pairs import source as pairs_source
from datasets.places import default_root
from datasets.toys import TOYS, toys
from flow import registry

DATASETS: dict[str, Callable[..., "DataSet"]] = {
    "digits": digits, "mnist": mnist, "fashion_mnist": fashion_mnist, "cifar10": cifar10, "folder": folder, "packed": packed,
    "pairs": pairs, "latents": latents, "toys": toys,
}  # fmt: skip
SHAPES: dict[str, tuple[int, ...]] = {
    "digits": (1, 8, 8), "mnist": (1, 28, 28), "fashion_mnist": (1, 28, 28), "cifar10": (3, 32, 32), "toys": (2,),
}  # fmt: skip
_SOURCES = {"pairs": pairs_source, "latents": latents_source}


class DataSet(Protocol):
    """What training and evaluation need of a data set.

    access: how `datasets.reading` and training read samples. "memory": one tensor `images` [N, ...]. "files": one by one,
    `data[k]`, in threads, or in worker processes in training. "disk": a batch at a time, `read(indices)`, from files that need
    no decoding. "posterior": mean and std of `moments(indices, mirrored)`, of which a latent is drawn, scaled by
    `normalised`; `has_flipped` says whether there are mirror images.
    """

    labels: Tensor | None  # int64 [N], on the CPU
    class_names: tuple[str, ...]

    @property
    def access(self) -> str: ...

    @property
    def codec(self) -> dict[str, Any] | None:
        """The autoencoder that decodes latents; None for pixels and points."""

    @property
    def notes(self) -> Sequence[str]:
        """Lines for the log, such as files that were skipped."""

    @property
    def image_shape(self) -> tuple[int, ...]:
        """The shape of what a network sees of a sample: (C, H, W), or (2,) for points."""

    def fingerprint(self) -> str:
        """Hash of the content, for caches of features."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        """A sample, without augmentation, and its label, -1 without labels."""


def sample_digest(data: DataSet) -> str:
    """Hash of the number of samples and of 64 of them with their labels, evenly spaced. It tells one data set from another
    without reading all of it, as `DataSet.fingerprint` does; a few samples that changed go unnoticed."""
    digest = hashlib.blake2b(str(len(data)).encode(), digest_size=16)
    for k in np.linspace(0, len(data) - 1, min(64, len(data))).astype(int).tolist():
        sample, label = data[k]
        digest.update(sample.contiguous().numpy())
        digest.update(str(label).encode())
    return digest.hexdigest()


class Dataset: ...


class IterableDataset: ...


def has_test_split(name: str) -> bool:
    """Whether the data set comes in a part for training and one for tests."""
    return name in DATASETS and "train" in inspect.signature(DATASETS[name]).parameters


@dataclass(frozen=True)
class DataSpec:
    """Which data set: the arguments of `build`."""

    name: str
    root: str | Path | None
    args: dict[str, Any]

    @classmethod
    def of(cls, data: Any) -> "DataSpec":
        """The data set of the section `data` of a configuration."""
        return cls(data.name, data.root, dict(data.args))

    @classmethod
    def of_folder(cls, path: str | Path, image_shape: tuple[int, ...]) -> "DataSpec":
        """The images below a folder as images of this shape (C, H, W); square ones are cropped and resized."""
        channels, height, width = image_shape
        return cls("folder", None, {"path": str(path), "size": width if height == width else None, "channels": channels})

    @classmethod
    def parse(cls, text: str, root: str | Path | None) -> "DataSpec | None":
        """The data set that NAME, NAME:train, NAME:test or toys:SHAPE stands for; None where NAME is no data set.

        Raises ValueError for another split or shape and for a data set without splits.
        """
        name, colon, split = text.partition(":")
        if name not in SHAPES:  # the others need a path
            return None
        if name == "toys":
            shapes = [shape for shape in TOYS if shape != "image"]  # which needs a path
            if split not in shapes:
                raise ValueError(f"{text}: must be toys:SHAPE, SHAPE one of {', '.join(shapes)}")
            return cls(name, root, {"name": split})
        if not colon:
            return cls(name, root, {})
        if not has_test_split(name) or split not in ("train", "test"):
            able = ", ".join(filter(has_test_split, DATASETS))
            raise ValueError(f"{text}: must be NAME, NAME:train or NAME:test; data sets with these splits: {able}")
        return cls(name, root, {"train": split == "train"})

    def build(self) -> DataSet:
        """The data set; raises what `build` raises."""
        return build(self.name, self.root, self.args)

    def behind(self, derived: Collection[str] = ("pairs", "latents")) -> "DataSpec":
        """The real data behind a set of a kind that is `derived`: behind pairs what their flow was trained on, behind latents
        the images; others are that themselves. Raises as `build` does for a set that is not there.
        """
        if self.name not in derived:
            return self
        source = _call(self.name, _SOURCES[self.name], self.root, self.args)
        return DataSpec(source["name"], source["root"] or self.root, source["args"]).behind(derived)

    def held_out(self) -> "HeldOut | None":
        """Real data that are not in these: the other split, the folder `held_out` of packed images, or for toys points of
        another seed. None where there are none.

        Raises ValueError for a seed that is no number, as in the header of a stranger's snapshot.
        """
        name, args = self.name, self.args
        if name == "digits" and (other := {"train": "test", "test": "train"}.get(str(args.get("split", "all")))):
            return HeldOut(f"{other} split", replace(self, args={**args, "split": other}))
        if has_test_split(name):
            train = bool(args.get("train", True))
            return HeldOut("test split" if train else "train split", replace(self, args={**args, "train": not train}))
        if name == "packed" and args.get("held_out"):
            return HeldOut("held-out images", replace(self, args={"path": args["held_out"]}))
        if name == "toys":
            seed = args.get("seed", 0)
            if not isinstance(seed, int):
                raise ValueError(f"seed={seed!r}: must be a whole number")
            return HeldOut("new points", replace(self, args={**args, "seed": seed + 1}))
        return None


class HeldOut(NamedTuple):
    """Real data outside of a data set."""

    title: str  # what they are called, as in "test split"
    spec: DataSpec


def expected_shape(name: str, args: dict[str, Any]) -> tuple[int, ...] | None:
    """The shape of what a network sees of the data set, (C, H, W) or (2,), where it is known without its files."""
    if name == "folder" and type(args.get("size")) is int and args.get("channels", 3) in (1, 3):
        return args.get("channels", 3), args["size"], args["size"]
    return SHAPES.get(name)


def build(name: str, root: str | Path | None, args: dict[str, Any]) -> DataSet:
    """The data set `name`; `root` (None: `default_root()`) holds downloaded sets, `args` are the set's own arguments.

    Raises ValueError for an unknown name or argument (naming what exists) and for a set that breaks the contract
    (`contract.check`), FileNotFoundError where the files are absent and cannot be downloaded.
    """
    if name not in DATASETS:
        raise ValueError(f"unknown data set {name!r}; choose from {', '.join(DATASETS)}")
    allowed = dict(list(inspect.signature(DATASETS[name]).parameters.items())[1:])  # the first one is the root
    registry.check_arguments(name, args, allowed, registry.text_where_declared)
    registry.check_arguments(name, args, allowed, registry.bool_where_declared)
    data = _call(name, DATASETS[name], root, args)
    contract.check(name, data)
    return data


def _call(name: str, function: Callable[..., Any], root: str | Path | None, args: dict[str, Any]) -> Any:
    """function(root, **args). Raises ValueError for arguments that it does not take."""
    try:
        return function(Path(root) if root else default_root(), **args)
    except TypeError as error:  # a missing argument, or a word where a number belongs
        raise ValueError(f"{name} cannot be built from {args}: {error}") from error
