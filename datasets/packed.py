"""Packed images, as `scripts/pack_images.py` writes them: decoded, cropped and resized once, read from the disk in training.

A folder holds manifest.json and shards (datasets/shards.py) with images uint8 [n, C, H, W], and labels int64 [n] where there
are any. Shards may differ in length, as damaged images of the source can be left out.
"""

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from datasets.places import resolve_path
from datasets.shards import open_shards, read_manifest

KIND = "packed images"
PATTERN = "images_*.safetensors"  # of the shards
KEYS = {"image_shape", "size", "crop", "shards", "digest"}  # of the manifest, besides those of all kinds
OPEN_FILES = 256


@dataclass
class Packed:
    """The images of a folder, each read from its place in a shard when it is used.

    They are not mapped into memory: mapped pages count as memory of the process, which then grows with the set, and a file
    that is cut off meanwhile would end the process by a signal.
    """

    access: ClassVar[str] = "disk"
    codec: ClassVar[None] = None  # pixels
    notes: ClassVar[tuple[str, ...]] = ()
    paths: list[Path]  # of the shards
    counts: list[int]  # of images in them, at least 1 each
    image_shape: tuple[int, ...]
    labels: Tensor | None  # int64 [N]
    class_names: tuple[str, ...]
    digest: str  # of the content of all shards
    skipped: tuple[str, ...] = ()  # names of damaged images of the source, which were left out

    def __post_init__(self):
        self._ends = np.cumsum(self.counts)
        self._starts = [_images_start(path) for path in self.paths]
        self._file = lru_cache(maxsize=OPEN_FILES)(_opened)

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        """Image uint8 [C, H, W] and its label (-1 without classes)."""
        return self.read([index])[0], -1 if self.labels is None else int(self.labels[index])

    def read(self, indices: Sequence[int]) -> Tensor:
        """The images with these indices, uint8 [b, C, H, W]. Raises OSError where a shard is not whole any more."""
        images = torch.empty((len(indices), *self.image_shape), dtype=torch.uint8)
        memory, size = memoryview(images.view(-1).numpy()), torch.Size(self.image_shape).numel()
        shards = np.searchsorted(self._ends, indices, side="right")
        rows = np.asarray(indices) - (self._ends - self.counts)[shards]
        for k, (shard, row) in enumerate(zip(shards.tolist(), rows.tolist(), strict=True)):
            file = self._file(self.paths[shard])
            start = self._starts[shard] + row * size
            if os.preadv(file.descriptor, [memory[k * size : (k + 1) * size]], start) != size:
                raise OSError(f"{self.paths[shard]}: was cut off; run pack_images with the same arguments")
        return images

    def fingerprint(self) -> str:
        return self.digest


class _File:
    """An open file, closed when nobody uses it."""

    def __init__(self, descriptor: int):
        self.descriptor = descriptor

    def __del__(self):
        os.close(self.descriptor)


def _opened(path: Path) -> _File:
    return _File(os.open(path, os.O_RDONLY))


def packed(root: Path, path: str, held_out: str | None = None) -> Packed:
    """The images in the folder `path` (as it is, or below `root`).

    held_out: another such folder, with images that training does not see; see `DataSpec.held_out`.

    Raises FileNotFoundError for a folder without a manifest and ValueError that names the first shard that is not what the
    manifest says (see `open_shards`).
    """
    folder = resolve_path(root, path)
    manifest = read_manifest(folder, KIND, KEYS)
    if held_out is not None:
        other = read_manifest(resolve_path(root, held_out), KIND, KEYS)
        for key in ("image_shape", "class_names"):
            if other[key] != manifest[key]:
                raise ValueError(f"held_out={held_out}: has {key} {other[key]}, {path} has {manifest[key]}")
        if other["digest"] == manifest["digest"]:
            raise ValueError(f"held_out={held_out}: holds the images of {path}, which training sees")
    shards = open_shards(folder, manifest, path, KIND)
    labels = torch.cat([shard["labels"] for shard in shards]) if "labels" in shards[0] else None
    entries = [entry for entry in manifest["shards"] if entry["images"]]
    paths, counts = [folder / entry["name"] for entry in entries], [entry["images"] for entry in entries]
    shape, names, skipped = (tuple(manifest.get(key, ())) for key in ("image_shape", "class_names", "skipped"))
    return Packed(paths, counts, shape, labels, names, manifest["digest"], skipped)


def is_packed(folder: Path) -> bool:
    """Whether a folder holds packed images, whole or not."""
    return any(folder.glob(PATTERN))


def _images_start(path: Path) -> int:
    """Where in a shard the first image begins. A safetensors file is 8 bytes with the length of a JSON header, the header, and
    the data (huggingface.co/docs/safetensors, "Format")."""
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        return 8 + length + json.loads(file.read(length))["images"]["data_offsets"][0]
