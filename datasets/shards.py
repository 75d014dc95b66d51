"""Folders of shards: safetensors files with a digest of their content, and manifest.json, which says what they hold.

What generated data sets (`pairs`, `latents`) lie in: a writer that was killed resumes with the shards that are not whole.
"""

import hashlib
import json
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

MANIFEST = "manifest.json"


def resolve_path(root: Path, path: str) -> Path:
    """The folder `path` as it is, or below `root`."""
    folder = Path(path)
    return folder if folder.is_dir() or folder.is_absolute() else root / folder


def read_manifest(folder: Path, kind: str, keys: set[str]) -> dict[str, Any]:
    """The manifest of a folder of `kind` ("pairs", "latents"), whose script is scripts.make_pairs or scripts.cache_latents.

    Raises FileNotFoundError where there is none, ValueError where it lacks one of the `keys` or does not say which data
    set is behind it: {"name", "root", "args"} under "data".
    """
    file = folder / MANIFEST
    if not file.is_file():
        script = {"pairs": "make_pairs", "latents": "cache_latents"}[kind]
        raise FileNotFoundError(f"path={folder}: holds no {kind} ({MANIFEST} is not there); make some with scripts.{script}")
    try:
        manifest = json.loads(file.read_text(encoding="utf-8"))
        missing = (keys | {"data", "class_names"}) - manifest.keys()
        if missing or not {"name", "root", "args"} <= manifest["data"].keys():
            raise ValueError(f"it lacks {', '.join(sorted(missing)) or 'name, root and args of data'}")
        return manifest
    except (ValueError, AttributeError) as error:
        raise ValueError(f"path={file}: not a manifest of {kind} ({error})") from None


def save_shard(path: Path, tensors: dict[str, Tensor], header: dict[str, Any] | None = None) -> None:
    """Write the tensors of a shard with `header` and their digest; the caller makes the writing atomic.

    The same content gives the same bytes: the header is one entry, as safetensors writes several in any order.
    """
    tensors = {name: value.contiguous() for name, value in tensors.items()}
    save_file(tensors, path, metadata={"header": json.dumps({**(header or {}), "digest": content_hash(tensors)})})


def read_shard(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors, mapped from the file and read as they are used, and the header. Raises SafetensorError or OSError."""
    with safe_open(path, framework="pt") as file:
        header = json.loads((file.metadata() or {}).get("header", "{}"))
        return {name: file.get_tensor(name) for name in file.keys()}, header  # noqa: SIM118 (not a dict)


def verify_shard(path: Path, rows: int) -> str | None:
    """What is wrong with a shard of tensors [rows, ...], by its digest, or None."""
    if not path.is_file():
        return f"{path.name} is missing"
    try:
        tensors, header = read_shard(path)
    except (SafetensorError, OSError) as error:
        return f"{path.name} is damaged ({error})"
    if header.get("digest") != content_hash(tensors) or any(len(tensor) != rows for tensor in tensors.values()):
        return f"{path.name} is damaged (its content is not what was written)"
    return None


def content_hash(tensors: dict[str, Tensor]) -> str:
    """Hash of names, shapes and content."""
    digest = hashlib.blake2b(digest_size=16)
    for name in sorted(tensors):
        digest.update(f"{name} {tuple(tensors[name].shape)}".encode())
        digest.update(tensors[name].numpy())
    return digest.hexdigest()
