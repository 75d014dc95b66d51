"""Pairs (noise, image) of a trained flow, as `scripts/make_pairs.py` writes them; the data of reflow and distillation.

A folder holds manifest.json and shards. A shard is a safetensors file with images float16 [n, C, H, W], labels int64 [n]
where there are any, and a digest of its content in the header. The noise of generated images is a function of (seed,
index) and not stored; that of inverted real images is (noise, float16).
"""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

MANIFEST = "manifest.json"


@dataclass(frozen=True)
class Shard:
    name: str
    inverted: bool
    indices: range  # of the generated images, or of the inverted ones


@dataclass
class Pairs:
    """All pairs in memory: first those that were generated, then those whose image is real."""

    images: Tensor  # float16 [N, C, H, W], about [-1, 1]
    labels: Tensor | None  # int64 [N]
    class_names: tuple[str, ...]
    seed: int  # of the noise of the generated ones
    generated: int
    noise: Tensor | None  # float16 [N - generated, C, H, W]

    @property
    def image_shape(self) -> tuple[int, int, int]:
        return tuple(self.images.shape[1:])  # type: ignore[return-value]

    def __len__(self) -> int:
        return len(self.images)


def pairs(root: Path, path: str) -> Pairs:
    """The pairs in the folder `path` (as it is, or below `root`).

    Raises FileNotFoundError for a folder without a manifest and ValueError that names the first missing or damaged shard.
    """
    folder = _folder(root, path)
    manifest = read_manifest(folder)
    parts: dict[str, list[Tensor]] = {"images": [], "labels": [], "noise": []}
    for shard in shards(manifest):
        damage = damage_of(folder, shard)
        if damage:
            raise ValueError(f"path={path}: {damage}; run make_pairs with the same arguments: it makes this shard again")
        for name, tensor in _read(folder / shard.name)[0].items():
            parts[name].append(tensor)
    joined = {name: torch.cat(tensors) if tensors else None for name, tensors in parts.items()}
    return Pairs(
        images=joined["images"],
        labels=joined["labels"],
        class_names=tuple(manifest["class_names"]),
        seed=manifest["seed"],
        generated=manifest["generated"],
        noise=joined["noise"],
    )


def origin(root: Path, path: str) -> dict[str, Any]:
    """{"name": ..., "root": ..., "args": ...}: the real images that the flow behind the pairs was trained on."""
    return read_manifest(_folder(root, path))["data"]


def read_manifest(folder: Path) -> dict[str, Any]:
    file = folder / MANIFEST
    if not file.is_file():
        raise FileNotFoundError(f"path={folder}: holds no pairs ({MANIFEST} is not there); make some with scripts.make_pairs")
    try:
        manifest = json.loads(file.read_text(encoding="utf-8"))
        missing = {"seed", "generated", "inverted", "shard_pairs", "class_names", "data"} - manifest.keys()
        if missing or not {"name", "root", "args"} <= manifest["data"].keys():
            raise ValueError(f"it lacks {', '.join(sorted(missing)) or 'name, root and args of data'}")
        return manifest
    except (ValueError, AttributeError) as error:
        raise ValueError(f"path={file}: not a manifest of pairs ({error})") from None


def shards(manifest: dict[str, Any]) -> list[Shard]:
    """The shards that a folder with this manifest has to hold."""
    found = []
    for kind in ("generated", "inverted"):
        indices = range(manifest[kind])
        size = manifest["shard_pairs"]
        cuts = [indices[i : i + size] for i in range(0, len(indices), size)]
        found += [Shard(f"{kind}_{i:05d}.safetensors", kind == "inverted", cut) for i, cut in enumerate(cuts)]
    return found


def damage_of(folder: Path, shard: Shard) -> str | None:
    """What is wrong with the shard, None if it is whole."""
    path = folder / shard.name
    if not path.is_file():
        return f"{shard.name} is missing"
    try:
        tensors, digest = _read(path)
    except (SafetensorError, OSError) as error:
        return f"{shard.name} is damaged ({error})"
    if digest != _digest(tensors) or len(tensors["images"]) != len(shard.indices):
        return f"{shard.name} is damaged (its content is not what was written)"
    return None


def save_shard(path: Path, tensors: dict[str, Tensor]) -> None:
    """Write the tensors of a shard; the caller makes the writing atomic."""
    tensors = {name: value.contiguous() for name, value in tensors.items()}
    save_file(tensors, path, metadata={"digest": _digest(tensors)})


def _read(path: Path) -> tuple[dict[str, Tensor], str]:
    with safe_open(path, framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}, (file.metadata() or {}).get("digest", "")  # noqa: SIM118


def _digest(tensors: dict[str, Tensor]) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for name in sorted(tensors):
        digest.update(f"{name} {tuple(tensors[name].shape)}".encode())
        digest.update(tensors[name].numpy())
    return digest.hexdigest()


def _folder(root: Path, path: str) -> Path:
    given = Path(path)
    return given if given.is_dir() or given.is_absolute() else root / given
