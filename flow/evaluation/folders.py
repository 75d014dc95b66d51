"""The row of a folder of images, by sample.py or from elsewhere."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from torch import Tensor

import datasets
from configs.errors import UserError
from configs.schema import Config
from datasets import reading
from datasets.encoded import EncodedImages
from flow.evaluation import collecting
from flow.evaluation.control import add_control
from flow.evaluation.real_images import load_real_images
from flow.evaluation.reference import Reference, same_classes
from flow.evaluation.runner import Evaluation, EvaluationSettings
from flow.runtime import distributed, files
from flow.runtime.errors import error_context
from flow.sampling import named_data
from flow.sampling.conditions import labels_for
from flow.sampling.settings import SamplerSettings


def write_row(
    settings: EvaluationSettings, accelerator: Accelerator, out: Path, samples: Path, config: Config, data: EncodedImages,
    stored: dict[str, Any] | None, trained: bool,
) -> list[dict]:  # fmt: skip
    """The rows of real images and of the images `data` of a folder, on the main process; then the report.

    Args:
        stored: its sampling.json, which tells the labels.
        trained: whether `config` is that of the training.
    """
    real_images = load_real_images(settings.reference, accelerator, data.image_shape, config)
    labels, own_names = labels_of(samples, data, stored)
    real_names = real_images.data.class_names if real_images else ()
    comparable = labels is not None and has_classes(real_names, own_names, stored)
    if not comparable and not own_names and real_images:  # nobody knows which classes the labels are of
        labels = None
    classes_of = [config.data.name] if trained else []
    classes_of += [real_images.spec.name] if real_images and comparable else []
    for note in data.notes:
        accelerator.print(f"note: {note}")
    ev = Evaluation.build(settings, accelerator, out, data.image_shape, real_images, classes_of, own_names)
    if trained:
        ev.load_training(config, data.image_shape)
    elif "memorization" in settings.metrics:
        if settings.metrics == ("memorization",):
            raise UserError(
                "--metrics memorization: the training set of these images is not known; name it with -c or data.name"
            )
        accelerator.print("note: no memorization: the training set of these images is not known; name it with -c or data.name")
        ev.settings = replace(settings, metrics=tuple(name for name in settings.metrics if name != "memorization"))
    real_labels = real_images.data.labels if real_images and comparable else None
    if not comparable:
        ev.reference.labels = None
    if stored and not stored["labels"] and real_labels is not None and len(set(real_labels.bincount().tolist())) > 1:
        accelerator.print(
            f"warning: the images of {samples} take turns over the classes, which are not equally frequent in the "
            "reference; this makes the distance larger (with --weights the classes are drawn by their frequency)"
        )
    real = add_control(ev)
    name = samples.resolve().name  # of "." too
    subject = {"weights": name, "n": len(data), "first": 0}
    identity = {"images": data.fingerprint(), **classes_identity(labels, own_names, ev.reference)}
    distributed.check_same(accelerator, identity["images"], f"--samples {samples}, its images")
    images = partial(collecting.read, data, accelerator, settings.batch_size, "samples", key="--samples")

    def compute() -> dict | None:
        measured, seconds = ev.measure(images(), labels)
        ev.draw_closest(measured, name, partial(reading.read, data))
        return {**measured.columns, "seconds": seconds} if measured else None

    measured = ev.evaluate_row(subject, identity, compute)
    accelerator.print(ev.write_report())
    ev.print_existing()
    accelerator.wait_for_everyone()
    return [row for row in (real, measured and measured[0]) if row]


def labels_of(samples: Path, data: EncodedImages, stored: dict[str, Any] | None) -> tuple[Tensor | None, tuple[str, ...]]:
    """Labels int64 [N] of the images of a folder, and the names of their classes, () where nobody knows them.

    They come from what sample.py has `stored`, which knows them by the numbers of the images, else from subfolders.
    """
    if not stored:
        return data.labels, data.class_names
    turns = tuple(stored["labels"]) if stored["labels"] else None
    names = [data.name_of(k) for k in range(len(data))]
    if foreign := next((name for name in names if not Path(name).stem.isdecimal()), None):
        raise UserError(
            f"--samples {samples}: {named_data.IMAGES}/{foreign} is not an image of sample.py; move it out of this folder"
        )
    indices = [int(Path(name).stem) for name in names]  # an interrupted run leaves gaps
    labels = labels_for(indices, SamplerSettings(labels=turns), stored["num_classes"])
    return labels, tuple(stored.get("class_names") or ())


def has_classes(names: Sequence[str], own_names: Sequence[str], stored: dict[str, Any] | None) -> bool:
    """Whether a reference with classes of these names has those of the samples: by name, as subfolders may be anything; by
    their number where an earlier sample.py has `stored` no names."""
    if stored and not own_names:
        return len(names) == stored["num_classes"]
    return same_classes(own_names, names)


def classes_identity(labels: Tensor | None, names: Sequence[str], real: Reference) -> dict[str, str]:
    """The entry of a row's identity for what decides which metrics of classes have a value, beside the images; none without
    labels, where no metric asks for classes."""
    if labels is None:
        return {}
    real_labels = None if real.labels is None else real.labels.tolist()
    classes = [labels.tolist(), list(names), real_labels, list(real.class_names)]
    return {"classes": hashlib.sha256(json.dumps(classes).encode()).hexdigest()[:16]}


def read_folder(samples: Path) -> tuple[EncodedImages, dict[str, Any] | None]:
    """The images of a folder, and what sample.py wrote beside them, None for a folder from elsewhere."""
    if samples.is_file():
        of_sample = (samples.parent / named_data.RECORD).is_file()
        remedy = f"its images are in {samples.parent}; name that folder" if of_sample else "name a folder of images"
        raise UserError(f"--samples {samples}: is a file; {remedy}")
    if not samples.is_dir():
        raise UserError(f"--samples {samples}: there is no such folder")
    note = samples / named_data.RECORD
    stored = None
    if note.is_file():
        with error_context(f"--samples {samples}: sampling.json cannot be used"):
            stored = sampling_of(files.read_json(note))
    with error_context("--samples"):
        args = {"path": str(named_data.images_in(samples)), "channels": stored["image_shape"][0] if stored else 3}
        data = datasets.build(name="folder", root=None, args=args)
    assert isinstance(data, EncodedImages)
    return data, stored


def sampling_of(stored: dict[str, Any]) -> dict[str, Any]:
    """What sample.py wrote beside its images. Raises ValueError where it is something else."""
    whole = {"image_shape", "labels", "num_classes"} <= stored.keys()
    if whole:
        shape = stored["image_shape"]
        labels = stored["labels"] or []
        classes = 1 if stored["num_classes"] is None else stored["num_classes"]
        if isinstance(shape, list) and len(shape) == 1:
            raise ValueError("it is of points, not of images; evaluate their flow with --weights")
        names = stored.get("class_names") or []  # earlier versions stored none
        lists = all(isinstance(value, list) for value in (shape, labels, names)) and len(shape) == 3
        whole = lists and all(type(n) is int and 0 <= n < 2**31 for n in [*shape, *labels, classes]) and classes > 0
        whole = whole and all(isinstance(name, str) for name in names)
    if not whole:
        raise ValueError("it lacks image_shape, labels or num_classes, or holds something else there or in class_names")
    return stored
