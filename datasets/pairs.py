"""Pairs (noise, image) of a trained flow, as `scripts/make_pairs.py` writes them; the data of reflow and distillation.

A folder holds manifest.json and shards (datasets/shards.py) with images float16 [n, C, H, W] (of a flow on latents: those)
and labels int64 [n] where there are any. The noise of generated images is a function of (seed, index) and not stored; that
of inverted real images is (noise, float16). With `make_pairs --keep_states K` a shard also holds K states of each path
between noise and image, float16 [n, K, C, H, W].
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from datasets import shards
from datasets.images import Images
from datasets.places import resolve_path
from datasets.shards import read_shard, verify_shard


@dataclass(frozen=True)
class Shard:
    name: str
    inverted: bool
    indices: range  # of the generated images, or of the inverted ones


@dataclass(kw_only=True)
class Pairs(Images):
    """All pairs in memory, images float16, about [-1, 1]: first those that were generated, then those whose image is real."""

    seed: int  # of the noise of the generated ones
    source: dict[str, Any]  # {"name": ..., "args": ...} of what the paths start from, as flow.source
    source_fingerprint: str | None = None  # of its samples, where it is a data set
    generated: int
    noise: Tensor | None  # float16 [N - generated, C, H, W]
    states: Tensor | None = None  # float16 [N, K, C, H, W], of each path from noise to image, between the two
    state_times: tuple[float, ...] = ()  # of the K states, in (0, 1), rising


def pairs(root: Path, path: str) -> Pairs:
    """The pairs in the folder `path` (as it is, or below `root`).

    Raises FileNotFoundError for a folder without a manifest and ValueError that names the first missing or damaged shard.
    """
    folder = resolve_path(root, path)
    manifest = read_manifest(folder)
    parts: dict[str, list[Tensor]] = {"images": [], "labels": [], "noise": [], "states": []}
    for shard in shards_of(manifest):
        damage = verify_shard(folder / shard.name, len(shard.indices))
        if damage:
            raise ValueError(f"path={path}: {damage}; run make_pairs with the same arguments to regenerate this shard")
        tensors = read_shard(folder / shard.name)[0]
        if unknown := tensors.keys() - parts.keys():
            again = "run make_pairs to regenerate them in another folder"
            raise ValueError(f"path={path}: {shard.name} holds {min(unknown)}, which pairs do not have; {again}")
        for name, tensor in tensors.items():
            parts[name].append(tensor)
    joined = {name: torch.cat(tensors) if tensors else None for name, tensors in parts.items()}
    return Pairs(
        images=joined["images"],
        labels=joined["labels"],
        class_names=tuple(manifest["class_names"]),
        seed=manifest["seed"],
        generated=manifest["generated"],
        source=manifest.get("source", {"name": "gaussian", "args": {}}),
        source_fingerprint=manifest.get("source_fingerprint"),
        noise=joined["noise"],
        states=joined["states"],
        state_times=tuple(manifest.get("state_times", ())),
        codec=manifest.get("codec"),
    )


def source(root: Path, path: str) -> dict[str, Any]:
    """{"name": ..., "root": ..., "args": ...}: the data set that the flow behind the pairs was trained on."""
    return read_manifest(resolve_path(root, path))["data"]


def read_manifest(folder: Path) -> dict[str, Any]:
    return shards.read_manifest(folder, "pairs", {"seed", "generated", "inverted", "shard_pairs"})


def shards_of(manifest: dict[str, Any]) -> list[Shard]:
    """The shards that a folder with this manifest has to hold."""
    result = []
    for kind in ("generated", "inverted"):
        indices = range(manifest[kind])
        size = manifest["shard_pairs"]
        cuts = [indices[i : i + size] for i in range(0, len(indices), size)]
        result += [Shard(f"{kind}_{i:05d}.safetensors", kind == "inverted", cut) for i, cut in enumerate(cuts)]
    return result
