"""The row of real images: what a perfect model would reach."""

import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from datasets import DataSet
from flow.evaluation import memorization, reference, results
from flow.evaluation.features import FeatureSet
from flow.evaluation.real_images import RealImages, build_if_present, load_features
from flow.evaluation.reference import Reference
from flow.evaluation.runner import Evaluation
from flow.noise import generator
from flow.sampling.conditions import labels_by_frequency


def add_control(ev: Evaluation) -> dict | None:
    """The row of a perfect model: as many real images as there are samples, or as there are, that are not in the reference.
    It is returned on the main process, where there is one.

    They come from the other split of the data set, for toys from another seed; where a set has neither, from a random half
    of the reference that is compared with the other half. Their classes are as frequent as in the reference, as those of
    samples are; within a class, and where there are no labels, they are a random choice.
    """
    source = ev.real_images
    if not ev.settings.control:
        return None
    if source is None:
        ev.accelerator.print("note: no row of real images: an npz file of statistics holds none")
        return None
    other = source.spec.held_out()
    if not other:
        return _half_against_half(ev, source)
    data = build_if_present(ev.accelerator, other.spec, "row of real images")
    return None if data is None else _held_out(ev, source, data, other.title)


def _held_out(ev: Evaluation, source: RealImages, data: DataSet, title: str) -> dict | None:
    """The row of images of another split."""
    positions = _positions(ev, source, generator("control").permutation(len(data)), data.labels, source.data.labels)

    def compute() -> dict | None:
        start = time.perf_counter()
        _, samples = load_features(
            ev.accelerator, ev.extractor, ev.settings.batch_size, data, source, "features of real images", ev.extractor.layers,
            positions,
        )  # fmt: skip
        return _measure(ev, data, positions, samples, ev.reference, ev.training, time.perf_counter() - start)

    return _evaluate(ev, title, positions, compute, {"images": data.fingerprint()})


def _half_against_half(ev: Evaluation, source: RealImages) -> dict | None:
    """The row of one half of the reference against the other half, which also plays the part of the training set."""
    data, layer = source.data, ev.extractor.layer
    order = generator("control").permutation(len(data))
    half, rest = order[: len(data) // 2], order[len(data) // 2 :]
    positions = _positions(ev, source, half, data.labels, None if data.labels is None else data.labels[rest])

    def compute() -> dict | None:
        start = time.perf_counter()
        ref, training = ev.reference, ev.training
        if ref.feature_set is None:  # not the main process
            return None
        samples = ref.feature_set.select(layer, np.array(positions))
        other = reference.from_features(ref.name, ref.identity, ref.feature_set.select(layer, rest), layer)
        other.class_names = ref.class_names
        other.labels = None if ref.labels is None else ref.labels[rest]
        if training and training.data.fingerprint() == data.fingerprint():
            training = memorization.training_set(data, training.features[torch.from_numpy(rest)], None)
        return _measure(ev, data, positions, samples, other, training, time.perf_counter() - start)

    return _evaluate(ev, "half against half", positions, compute)


def _positions(
    ev: Evaluation, source: RealImages, pool: np.ndarray, labels: Tensor | None, reference_labels: Tensor | None
) -> list[int]:
    """The images of the pool that are measured; none, with a note, where there are too few."""
    n = min(ev.settings.n_samples, len(pool))
    if n < 2:
        ev.accelerator.print(f"note: no row of real images: {source.name} has too few")
        return []
    return choose_by_frequency(pool.tolist(), labels, reference_labels, n)


def _measure(
    ev: Evaluation, data: DataSet, positions: list[int], samples: FeatureSet | None, ref: Reference,
    training: memorization.TrainingSet | None, seconds: float,
) -> dict | None:  # fmt: skip
    """The columns of these images, whose features are `samples`, on the main process."""
    if samples is None:
        return None
    labels = None if data.labels is None else data.labels[positions]
    measured = ev.compute_metrics(samples, ref, labels, data.class_names, training)
    points: Any = data
    if getattr(points, "log_density", None):
        measured.metrics["held_out_log_p"] = points.log_density(points.images[positions].double()).mean().item()
    return {**measured.columns, "seconds": seconds}


def _evaluate(
    ev: Evaluation, kind: str, positions: list[int], compute: Callable[[], dict | None], identity: dict[str, str] | None = None
) -> dict | None:
    """The row of real images of this kind, on the main process; None where there are none."""
    if not positions:
        return None
    subject = dict.fromkeys(("captions", "method", "steps", "guidance_scale"))
    subject = {"weights": f"{results.CONTROL} ({kind})", **subject, "n": len(positions), "first": 0}
    result = ev.evaluate_row(subject, {"control": kind, **(identity or {})}, compute)
    return result[0] if result else None


def choose_by_frequency(pool: Sequence[int], labels: Tensor | None, reference_labels: Tensor | None, n: int) -> list[int]:
    """n of the positions in `pool`, each class as often as among the reference labels, in the order of the pool within it.

    A class that runs out is replaced by the next images of the pool; without labels these are all.

    Args:
        labels: int64 [N], the classes by position.
    """
    if labels is None or reference_labels is None:
        return list(pool[:n])
    classes = labels.tolist()
    counts = reference_labels.bincount(minlength=max(classes) + 1).tolist()
    by_class: list[list[int]] = [[] for _ in counts]
    for k in reversed(pool):
        by_class[classes[k]].append(k)
    positions = [by_class[c].pop() for c in labels_by_frequency(counts, n) if by_class[c]]
    used = set(positions)
    return positions + [k for k in pool if k not in used][: n - len(positions)]
