"""Packed images, as `scripts/pack_images.py` writes them: decoded, cropped and resized once, mapped from the disk in training.

A folder holds manifest.json and shards (datasets/shards.py) with images uint8 [n, C, H, W], and labels int64 [n] where there
are any. Shards may differ in length, as damaged images of the source can be left out.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from datasets.shards import open_shards, read_manifest, resolve_path

KIND = "packed images"
KEYS = {"image_shape", "size", "crop", "shards", "digest"}  # of the manifest, besides those of all kinds
PATTERN = "images_*.safetensors"  # of the shards


@dataclass
class Packed:
    """All images of a folder, read from the disk as they are used."""

    access: ClassVar[str] = "mapped"
    codec: ClassVar[None] = None  # pixels
    notes: ClassVar[tuple[str, ...]] = ()
    shards: list[Tensor]  # uint8 [n, C, H, W] each
    labels: Tensor | None  # int64 [N]
    class_names: tuple[str, ...]
    digest: str  # of the content of all shards

    def __post_init__(self):
        self._ends = np.cumsum([len(shard) for shard in self.shards])

    @property
    def image_shape(self) -> tuple[int, ...]:
        return tuple(self.shards[0].shape[1:])

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        """Image uint8 [C, H, W] and its label (-1 without classes)."""
        return self.read([index])[0], -1 if self.labels is None else int(self.labels[index])

    def read(self, indices: Sequence[int]) -> Tensor:
        """The images with these indices, uint8 [b, C, H, W]."""
        images = torch.empty((len(indices), *self.image_shape), dtype=torch.uint8)
        shards = np.searchsorted(self._ends, indices, side="right")
        rows = np.asarray(indices) - self._ends[shards]  # counted from the end of the shard
        for image, shard, row in zip(images, shards.tolist(), rows.tolist(), strict=True):
            image.copy_(self.shards[shard][row])
        return images

    def fingerprint(self) -> str:
        return self.digest


def packed(root: Path, path: str, held_out: str | None = None) -> Packed:
    """The images in the folder `path` (as it is, or below `root`).

    held_out: another such folder, with images that training does not see; see `datasets.held_out`.

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
    shards = open_shards(folder, manifest, path, KIND)
    labels = torch.cat([shard["labels"] for shard in shards]) if "labels" in shards[0] else None
    return Packed([shard["images"] for shard in shards], labels, tuple(manifest["class_names"]), manifest["digest"])


def is_packed(folder: Path) -> bool:
    """Whether a folder holds packed images, whole or not."""
    return any(folder.glob(PATTERN))
