"""Latents of images, as `scripts/cache_latents.py` writes them: what a flow in the space of an autoencoder is trained on.

A folder holds manifest.json and shards (datasets/shards.py) of float16 tensors [n, C, h, w]: mean and std of the posterior
q(z | image), mean_flipped and std_flipped of the mirrored image, and labels int64 [n] where there are any. A latent is
z = mean + std e with e ~ N(0, I), drawn anew each time; networks see x1 = (z - shift) / scale, which has mean 0 and
variance 1 in each channel over the data set. The manifest says which autoencoder (`codec`) and which images are behind it.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from datasets.places import resolve_path
from datasets.shards import open_shards, read_manifest


@dataclass
class Latents:
    """All latents of a folder, read from the disk as they are used; each shard but the last holds `rows` images."""

    access: ClassVar[str] = "posterior"
    notes: ClassVar[tuple[str, ...]] = ()
    shards: list[dict[str, Tensor]]
    rows: int
    labels: Tensor | None  # int64 [N]
    class_names: tuple[str, ...]
    codec: dict[str, Any]  # name, source, digest, shift, scale and image_shape, see models/autoencoder.py
    digest: str  # of the content of all shards

    def __post_init__(self):
        self._scaling: dict[torch.device, tuple[Tensor, Tensor]] = {}  # shift and scale [C, 1, 1] by device

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """The shape of a latent: (C, h, w)."""
        return tuple(self.shards[0]["mean"].shape[1:])  # type: ignore[return-value]

    @property
    def has_flipped(self) -> bool:
        return "mean_flipped" in self.shards[0]

    def __len__(self) -> int:
        return (len(self.shards) - 1) * self.rows + len(self.shards[-1]["mean"])

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        """The mean of the posterior of one image, float32 [C, h, w], normalised, and its label (-1 without classes)."""
        mean, _ = self.moments([index])
        return self.normalised(mean[0].float()), -1 if self.labels is None else int(self.labels[index])

    def moments(self, indices: list[int], mirrored: list[bool] | None = None) -> tuple[Tensor, Tensor]:
        """Mean and std float16 [b, C, h, w] of these images, or of their mirror images."""
        read: dict[str, list[Tensor]] = {"mean": [], "std": []}
        for index, flip in zip(indices, mirrored or [False] * len(indices), strict=True):
            shard, row = divmod(index, self.rows)
            for name, rows in read.items():
                rows.append(self.shards[shard][f"{name}_flipped" if flip else name][row])
        return torch.stack(read["mean"]), torch.stack(read["std"])

    def normalised(self, z: Tensor) -> Tensor:
        """(z - shift) / scale, on the device of z [..., C, h, w]; `VAE.decode` is the way back."""
        if z.device not in self._scaling:  # once: the copy waits for all that a GPU has to do
            shift, scale = (torch.tensor(self.codec[key]).view(-1, 1, 1).to(z.device) for key in ("shift", "scale"))
            self._scaling[z.device] = shift, scale
        shift, scale = self._scaling[z.device]
        return (z - shift) / scale

    def fingerprint(self) -> str:
        return self.digest


def latents(root: Path, path: str) -> Latents:
    """The latents in the folder `path` (as it is, or below `root`).

    Raises FileNotFoundError for a folder without a manifest and ValueError that names the first shard that is not what the
    manifest says (see `open_shards`).
    """
    folder = resolve_path(root, path)
    manifest = read_manifest(folder, "latents", {"codec", "shards", "shard_images", "digest"})
    shards = open_shards(folder, manifest, path, "latents")
    labels = torch.cat([shard["labels"] for shard in shards]) if "labels" in shards[0] else None
    names = tuple(manifest["class_names"])
    return Latents(shards, manifest["shard_images"], labels, names, manifest["codec"], manifest["digest"])


def source(root: Path, path: str) -> dict[str, Any]:
    """{"name": ..., "root": ..., "args": ...}: the images that the latents were made from."""
    return read_manifest(resolve_path(root, path), "latents", {"codec"})["data"]
