"""The cache of features of real images on disk."""

import hashlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator

from configs.errors import first_line
from datasets import DataSet
from flow.evaluation import collecting
from flow.evaluation.features import Extractor, FeatureSet
from flow.evaluation.metrics_2d import PointExtractor
from flow.runtime import distributed, files


def cached(
    accelerator: Accelerator, extractor: Extractor | PointExtractor, data: DataSet, identity: str, path: Path,
    batch_size: int, what: str, key: str, layers: Sequence[str], order: Sequence[int] | None = None,
) -> FeatureSet | None:  # fmt: skip
    """The features of the images of a data set, image k from data[order[k]], on the main process (None on the others): from the
    file at `path` where it holds those of this `identity` (see `identity_of`), else computed and stored there; a damaged
    file is named and written again. `what` is the name of the bar, `key` that of an error about an image."""
    n = len(data) if order is None else len(order)
    features = None
    if accelerator.is_main_process:
        try:
            features = load_cached(path, layers, identity, n)
        except ValueError as error:
            accelerator.print(f"warning: {path}: damaged cache of features ({error}); computing them again")
    if distributed.any_process(accelerator, features is not None):
        return features
    images = collecting.read(data, accelerator, batch_size, what, order, key)
    features = collecting.collect(accelerator, extractor, images, layers)
    if features is not None:
        try:
            with files.atomic_file(path) as temporary:
                save_cached(temporary, features, identity)
        except OSError as error:
            accelerator.print(f"warning: the {what} are not cached: {error}")
    return features


def identity_of(fingerprint: str, extractor: Extractor | PointExtractor, layers: Sequence[str]) -> str:
    """Changes with the images, the extractor, its layer and its weights."""
    return hashlib.sha256(f"{fingerprint} {extractor.identity(layers)}".encode()).hexdigest()[:16]


def save_cached(path: Path, features: FeatureSet, identity: str) -> None:
    """All layers of the features and a digest of them; `path` ends in .npz, the caller makes the writing atomic."""
    matrices = {name: features.matrix(name).numpy() for name in features.rows}
    np.savez(path, digest=np.array(_digest(matrices, identity)), **matrices)  # type: ignore[arg-type]


def load_cached(path: Path, layers: Sequence[str], identity: str, n: int) -> FeatureSet | None:
    """The features of n images that `save_cached` wrote, or None where there is no such file.

    The first of the `layers` is that of the statistics. Raises ValueError for a damaged file.
    """
    if not path.exists():
        return None
    try:
        with np.load(path, allow_pickle=False) as file:
            stored = str(file["digest"])
            matrices = {name: file[name] for name in file.files if name != "digest"}
            if stored != _digest(matrices, identity):
                raise ValueError("its content does not match its digest")
            if set(matrices) != set(layers) or any(len(matrix) != n for matrix in matrices.values()):
                raise ValueError(f"it does not hold {n} rows of {', '.join(layers)}")
    except Exception as error:  # zipfile, zlib and numpy raise a dozen kinds for a damaged file
        raise ValueError(first_line(error)) from None
    features = FeatureSet()
    features.add(layers[0], range(n), {name: torch.from_numpy(matrix) for name, matrix in matrices.items()})
    return features


def _digest(matrices: dict[str, np.ndarray], identity: str) -> str:
    """SHA-256 of features {layer: [n, d]} and of what they are features of."""
    digest = hashlib.sha256(identity.encode())
    for name, matrix in sorted(matrices.items()):
        digest.update(f"{name} {matrix.dtype} {matrix.shape}".encode())
        digest.update(np.ascontiguousarray(matrix).data)
    return digest.hexdigest()
