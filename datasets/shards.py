"""Folders of shards: safetensors files with a digest of their content, and manifest.json, which says what they hold.

The data sets that scripts write (`pairs`, `latents`, `packed`) are such folders. A writer that was killed and is started again
writes only shards that are missing or damaged.
"""

import contextlib
import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

MANIFEST = "manifest.json"
SCRIPTS = {"pairs": "make_pairs", "latents": "cache_latents", "packed images": "pack_images"}  # that write a folder of a kind


def read_manifest(folder: Path, kind: str, keys: set[str]) -> dict[str, Any]:
    """The manifest of a folder of `kind`, a key of SCRIPTS.

    Raises FileNotFoundError where there is none, ValueError where it lacks one of the `keys` or does not say which data
    set is behind it: {"name", "root", "args"} under "data".
    """
    if folder.is_file():
        raise FileNotFoundError(f"path={folder}: is a file; name the folder that scripts.{SCRIPTS[kind]} wrote")
    file = folder / MANIFEST
    if not file.is_file():
        raise FileNotFoundError(
            f"path={folder}: holds no {kind} ({MANIFEST} is not there); make some with scripts.{SCRIPTS[kind]}"
        )
    try:
        manifest = json.loads(file.read_text(encoding="utf-8"))
        if not isinstance(manifest, dict) or not isinstance(manifest.get("data", {}), dict):
            raise ValueError("it holds something else")
        missing = (keys | {"data", "class_names"}) - manifest.keys()
        if missing or not {"name", "root", "args"} <= manifest["data"].keys():
            raise ValueError(f"it lacks {', '.join(sorted(missing)) or 'name, root and args of data'}")
        return manifest
    except ValueError as error:
        again = f"run scripts.{SCRIPTS[kind]} to regenerate them in another folder"
        raise ValueError(f"path={folder}: {MANIFEST} is damaged or not that of {kind} ({error}); {again}") from None


def save_shard(path: Path, tensors: dict[str, Tensor], header: dict[str, Any] | None = None) -> None:
    """Write the tensors of a shard with `header` and their digest; the caller makes the writing atomic.

    The same content gives the same bytes: the header is one entry, as safetensors writes several in any order.
    """
    tensors = {name: value.contiguous() for name, value in tensors.items()}
    save_file(tensors, path, metadata={"header": json.dumps({**(header or {}), "digest": content_hash(tensors)})})


def read_shard(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors, mapped from the file and read as they are used, and the header. Raises SafetensorError or OSError."""
    with safe_open(path, framework="pt") as file:
        try:
            header = json.loads((file.metadata() or {}).get("header", "{}"))
        except ValueError as error:
            raise OSError(f"its header is damaged: {error}") from None
        if not isinstance(header, dict):
            raise OSError("its header is damaged")
        return {name: file.get_tensor(name) for name in file.keys()}, header  # noqa: SIM118 (not a dict)


def verify_shard(path: Path, rows: int) -> str | None:
    """What is wrong with a shard of tensors [rows, ...], by its digest, or None. Rows that its header lists as `skipped` are
    not there."""
    if not path.is_file():
        return f"{path.name} is missing"
    try:
        tensors, header = read_shard(path)
    except (SafetensorError, OSError) as error:
        return f"{path.name} is damaged ({error})"
    rows -= len(header.get("skipped", ()))
    if header.get("digest") != content_hash(tensors) or any(len(tensor) != rows for tensor in tensors.values()):
        return f"{path.name} is damaged (its content is not what was written)"
    return None


def stored_settings(folder: Path, pattern: str) -> list[dict[str, Any]] | None:
    """The settings in the headers of the shards that can be read; None where there are no shards."""
    shards = sorted(folder.glob(pattern)) if folder.is_dir() else []
    settings = []
    for path in shards:
        with contextlib.suppress(SafetensorError, OSError):  # an unreadable shard is written again
            settings.append(read_shard(path)[1].get("settings", {}))
    return settings if shards else None


def list_shards(folder: Path, names: Iterable[str]) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """What a manifest says about whole shards: {"shards": [name, images, bytes and digest of each], "digest": of all}; and
    their headers."""
    entries, headers = [], []
    for name in names:
        tensors, header = read_shard(folder / name)
        size = (folder / name).stat().st_size
        entries.append({"name": name, "images": len(next(iter(tensors.values()))), "bytes": size, "digest": header["digest"]})
        headers.append(header)
    digest = hashlib.blake2b("".join(entry["digest"] for entry in entries).encode(), digest_size=16).hexdigest()
    return {"shards": entries, "digest": digest}, headers


def open_shards(folder: Path, manifest: dict[str, Any], path: str, kind: str) -> list[dict[str, Tensor]]:
    """The tensors of the shards that a manifest lists, mapped from their files.

    Raises ValueError that names the first shard that is not what the manifest says. Only sizes and digests in the headers are
    compared: reading everything would take minutes for a large set.
    """
    again = f"run {SCRIPTS[kind]} with the same arguments to regenerate this shard"
    shards = []
    if not manifest["shards"]:
        raise ValueError(f"path={path}: {MANIFEST} is damaged, it lists no shard; run {SCRIPTS[kind]} with the same arguments")
    for entry in manifest["shards"]:
        try:
            name, digest, images = entry["name"], entry["digest"], entry["images"]
        except (KeyError, TypeError):
            reason = f"{MANIFEST} is damaged, a shard lacks its name, digest or number of images"
            raise ValueError(f"path={path}: {reason}; run {SCRIPTS[kind]} with the same arguments") from None
        try:
            tensors, header = read_shard(folder / name)
        except (SafetensorError, OSError) as error:
            raise ValueError(f"path={path}: {name} is missing or damaged ({error}); {again}") from None
        if header.get("digest") != digest or any(len(tensor) != images for tensor in tensors.values()):
            raise ValueError(f"path={path}: {name} is not the shard of this manifest; {again}")
        shards.append(tensors)
    return shards


def content_hash(tensors: dict[str, Tensor]) -> str:
    """Hash of names, shapes and content."""
    digest = hashlib.blake2b(digest_size=16)
    for name in sorted(tensors):
        digest.update(f"{name} {tuple(tensors[name].shape)}".encode())
        digest.update(tensors[name].numpy())
    return digest.hexdigest()
