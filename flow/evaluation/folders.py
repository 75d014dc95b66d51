"""The row of a folder of images, by sample.py or from elsewhere."""

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

import datasets
from configs.schema import Config
from datasets.folder import EncodedImages
from flow.evaluation import collecting
from flow.evaluation.control import add_control
from flow.evaluation.real_images import load_real_images
from flow.evaluation.reference import same_classes
from flow.evaluation.runner import Evaluation, EvaluationSettings
from flow.runtime import files
from flow.runtime.errors import error_context
from flow.sampling.conditions import labels_for
from flow.sampling.settings import SamplerSettings


def write_row(
    settings: EvaluationSettings, accelerator: Accelerator, out: Path, samples: Path, config: Config, data: EncodedImages,
    stored: dict[str, Any] | None, trained: bool,
) -> None:  # fmt: skip
    """The row of the images `data` of a folder, beside that of real images, then the report.

    Args:
        stored: its sampling.json, which tells the labels.
        trained: whether `config` is that of the training.
    """
    real_images = load_real_images(settings.reference, accelerator, data.image_shape, config)
    class_names = real_images.data.class_names if real_images else ()
    labels = data.labels if same_classes(data.class_names, class_names) else None  # subfolders may be anything
    if stored:
        turns = tuple(stored["labels"]) if stored["labels"] else None
        with error_context(f"--samples {samples}: not a file of sample.py"):
            indices = [int(Path(data.name_of(k)).stem) for k in range(len(data))]  # an interrupted run leaves gaps
        labels = labels_for(indices, SamplerSettings(labels=turns), stored["num_classes"])
    matching = len(class_names) == stored["num_classes"] if stored else labels is not None
    if real_images and not matching:  # the labels are of other classes
        labels = None
    classes_of = [real_images.spec.name] if real_images and labels is not None else []
    ev = Evaluation.build(settings, accelerator, out, data.image_shape, real_images, classes_of)
    if trained:
        ev.load_training(config, data.image_shape)
    elif "memorization" in settings.metrics:
        accelerator.print("note: no memorization: the training set of these images is not known; name it with -c")
        ev.settings = replace(settings, metrics=tuple(name for name in settings.metrics if name != "memorization"))
    real_labels = real_images.data.labels if real_images and matching else None
    if not matching:
        ev.reference.labels = None
    if stored and not stored["labels"] and real_labels is not None and len(set(real_labels.bincount().tolist())) > 1:
        accelerator.print(
            f"warning: the images of {samples} take turns over the classes, which are not equally frequent in the "
            "reference; this makes the distance larger (with --weights the classes are drawn by their frequency)"
        )
    add_control(ev)
    subject = {"weights": samples.name, "n": len(data), "first": 0}
    images = partial(collecting.read, data, accelerator, settings.batch_size, "samples")

    def compute() -> dict | None:
        measured, seconds = ev.measure(images(), labels)
        ev.draw_closest(measured, samples.name, lambda positions: torch.stack([data[k][0] for k in positions]))
        return {**measured.columns, "seconds": seconds} if measured else None

    ev.evaluate_row(subject, {"images": data.fingerprint()}, compute)
    accelerator.print(ev.write_report())
    accelerator.wait_for_everyone()


def read_folder(samples: Path) -> tuple[EncodedImages, dict[str, Any] | None]:
    """The images of a folder, and what sample.py wrote beside them, None for a folder from elsewhere."""
    note, stored = samples / "sampling.json", None
    if note.is_file():
        with error_context(f"--samples {samples}: sampling.json cannot be used"):
            stored = sampling_of(files.read_json(note))
    path, channels = (samples / "images", stored["image_shape"][0]) if stored else (samples, 3)
    with error_context("--samples"):
        args = {"path": str(path), "channels": channels}
        data = datasets.build(name="folder", root=None, args=args)
    assert isinstance(data, EncodedImages)
    return data, stored


def sampling_of(stored: dict[str, Any]) -> dict[str, Any]:
    """What sample.py wrote beside its images. Raises ValueError where it is something else."""
    whole = {"image_shape", "labels", "num_classes"} <= stored.keys()
    if whole:
        shape, labels, classes = stored["image_shape"], stored["labels"] or [], stored["num_classes"] or 0
        if isinstance(shape, list) and len(shape) == 1:
            raise ValueError("it is of points, not of images; evaluate their flow with --weights")
        lists = isinstance(shape, list) and isinstance(labels, list) and len(shape) == 3
        whole = lists and all(type(n) is int and 0 <= n < 2**31 for n in [*shape, *labels, classes])
    if not whole:
        raise ValueError("it lacks image_shape, labels or num_classes, or holds something else there")
    return stored
