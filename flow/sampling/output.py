"""The output folder of sample.py: images/, grid.png, samples.npz, starts.csv and sampling.json."""

import csv
import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor

from flow.model import FlowModel
from flow.runtime import distributed, files
from flow.runtime.errors import error_context
from flow.runtime.output_dir import check_same_settings
from flow.sampling import images, named_data, snapshot, sources
from flow.sampling.conditions import column_names, condition_names, labels_for
from flow.sampling.generate import NFECounter, generate, shard
from flow.sampling.images import ImageWriter, is_whole_png, png_path
from flow.sampling.settings import SamplerSettings
from flow.sampling.snapshot import Snapshot
from flow.solvers import HAS_TOLERANCES

GRID_IMAGES = 100  # at most


def check_output_dir(
    folder: Path, snap: Snapshot, model: FlowModel, settings: SamplerSettings, mixed_precision: str, batch_size: int
) -> None:
    """Write sampling.json, or check that the existing one is of the same images.

    Raises:
        UserError: for a folder of another run.
    """
    source = sources.fingerprint(model)
    record = {
        "weights_sha256": snap.sha256,
        **dataclasses.asdict(settings),
        "num_classes": model.net.num_classes,
        "mixed_precision": mixed_precision,
        "image_shape": snap.decoded_shape,
        **({"bspp": batch_size} if settings.method in HAS_TOLERANCES else {}),
        **({"source_fingerprint": source} if source else {}),
        **({"class_names": list(snap.class_names)} if snap.class_names else {}),
    }
    path = folder / named_data.RECORD
    existing = None
    if path.is_file():
        with error_context(f"{path}: is damaged; name another folder with --save_dir"):
            existing = files.read_json(path)
    record = json.loads(json.dumps(record | snapshot.network_record(snap.config)))
    later = ("flow", "model", "source_fingerprint", "class_names")  # which folders of earlier versions do not have
    older = {key: record[key] for key in later if key in record}
    check_same_settings(folder, None if existing is None else [older | existing], record, "images", "sample.py")
    if existing is None:
        files.write_text(path, json.dumps(record, indent=1))


def write_images(
    accelerator: Accelerator, model: FlowModel, indices: range, batch_size: int, settings: SamplerSettings, folder: Path,
    shape: tuple[int, ...],
) -> tuple[float, float]:  # fmt: skip
    """Write images of a shape (C, H, W) as folder/000000.png and so on; batches that are there whole are not computed again.
    What is damaged or has another shape is named and replaced.

    Returns:
        (NFE, forwards) per image on the main process; (0, 0) where nothing was computed.
    """
    batches = shard(accelerator, indices, batch_size)
    counter = NFECounter()
    with distributed.progress(accelerator, sum(map(len, batches)), "sampling (images of this process)") as bar:

        def is_done(batch: range) -> bool:
            missing = [path for k in batch if not is_whole_png(path := png_path(folder, k), shape)]
            for path in filter(Path.exists, missing):
                bar.write(f"{path}: damaged, or of another size; regenerating")
            bar.update(0 if missing else len(batch))
            return not missing

        with ImageWriter(folder, max_pending=4 * batch_size) as writer:
            for batch in generate(accelerator, model, (b for b in batches if not is_done(b)), settings):
                writer.write(batch.indices, batch.images)
                counter.add(batch)
                bar.update(len(batch.indices))
    cost = counter.mean(accelerator)
    accelerator.wait_for_everyone()
    return cost


def sample_points(
    accelerator: Accelerator, model: FlowModel, indices: range, batch_size: int, settings: SamplerSettings,
) -> tuple[Tensor | None, float]:  # fmt: skip
    """Points float32 [N, 2] of all processes, in order, on the main process (None on the others), and their NFE."""
    batches = shard(accelerator, indices, batch_size)
    parts = []
    counter = NFECounter()
    with distributed.progress(accelerator, sum(map(len, batches)), "sampling (points of this process)") as bar:
        for batch in generate(accelerator, model, batches, settings):
            parts.append((batch.indices.start, batch.images))
            counter.add(batch)
            bar.update(len(batch.indices))
    nfe, _ = counter.mean(accelerator)
    points = distributed.gather_in_order(accelerator, parts)
    return None if points is None else torch.cat(points), nfe


def write_grid(
    path: Path, folder: Path, indices: range, settings: SamplerSettings, class_names: Sequence[str], num_classes: int | None,
    by_class: bool,
) -> list[str]:  # fmt: skip
    """Write the first 100 images of `folder` as one picture, with a column (`by_class`: a row) for each label or prompt.

    Returns:
        Lines of a legend for the names that the font cannot draw.
    """
    shown = torch.stack([torch.from_numpy(images.read_png(png_path(folder, k))) for k in indices[:GRID_IMAGES]])
    names = (condition_names if by_class else column_names)(settings, class_names, num_classes)
    images.write_png(path, images.labelled_grid(shown.permute(0, 3, 1, 2), len(names) or 10, names, by_class))
    return images.margin_names(names)[1]


def write_starts(path: Path, folder: Path, names: Sequence[str]) -> None:
    """Write a table of the images of a flow from data: each file, and the one that it starts at."""
    with files.atomic_file(path) as temporary, open(temporary, "w", encoding="utf-8", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["image", "start"])
        rows.writerows((png_path(folder, k).name, name) for k, name in enumerate(names))


def write_npz(path: Path, samples: np.ndarray, settings: SamplerSettings, num_classes: int | None) -> None:
    """Write arr_0, the layout that evaluation suites read, and labels int64 [N] where there are any.

    Args:
        samples: images uint8 [N, H, W, C], or points float32 [N, 2].
    """
    arrays: dict[str, Any] = {"arr_0": samples}
    labels = labels_for(range(len(samples)), settings, num_classes)
    if labels is not None:
        arrays["labels"] = labels.numpy()
    with files.atomic_file(path) as temporary, open(temporary, "wb") as file:
        np.savez(file, **arrays)


def read_pngs(folder: Path, indices: range) -> np.ndarray:
    """Images uint8 [N, H, W, C] of a folder that `write_images` wrote."""
    return np.stack([images.read_png(png_path(folder, k)) for k in indices])
