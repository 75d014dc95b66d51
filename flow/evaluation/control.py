"""The row of real images: what a perfect model would reach."""

import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from flow.evaluation import memorization, reference, results
from flow.evaluation.real_images import build_if_present, load_features
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
    accelerator, source = ev.accelerator, ev.real_images
    if not ev.settings.control:
        return None
    if source is None:
        accelerator.print("note: no row of real images: an npz file of statistics holds none")
        return None
    other, data = source.spec.held_out(), source.data
    if other:
        held_out = build_if_present(accelerator, other.spec, "row of real images")
        if held_out is None:
            return None
        data = held_out
    order = generator("control").permutation(len(data))
    pool, rest = (order, None) if other else (order[: len(data) // 2], order[len(data) // 2 :])
    ref_labels = source.data.labels if rest is None or source.data.labels is None else source.data.labels[rest]
    n = min(ev.settings.n_samples, len(pool))
    if n < 2 or (rest is not None and len(rest) < 2):
        accelerator.print(f"note: no row of real images: {source.name} has too few")
        return None
    positions = choose_by_frequency(pool.tolist(), data.labels, ref_labels, n)

    def compute() -> dict | None:
        start = time.perf_counter()
        layer, ref, training = ev.extractor.layer, ev.reference, ev.training
        if rest is None:
            _, samples = load_features(
                accelerator, ev.extractor, ev.settings.batch_size, data, source, "features of real images",
                ev.extractor.layers, positions,
            )  # fmt: skip
        elif ref.feature_set is not None:
            samples = ref.feature_set.select(layer, np.array(positions))
            ref = reference.from_features(ref.name, ref.identity, ref.feature_set.select(layer, rest), layer)
            ref.class_names, ref.labels = ev.reference.class_names, ev.reference.labels
            ref.labels = None if ref.labels is None else ref.labels[rest]
            if training and training.data.fingerprint() == data.fingerprint():  # the other half plays that part, too
                training = memorization.training_set(data, training.features[torch.from_numpy(rest)], None)
        else:
            return None
        seconds = time.perf_counter() - start
        if samples is None:
            return None
        labels = None if data.labels is None else data.labels[positions]
        measured = ev.compute_metrics(samples, ref, labels, data.class_names, training)
        points: Any = data
        if getattr(points, "log_density", None):
            measured.metrics["held_out_log_p"] = points.log_density(points.images[positions].double()).mean().item()
        return {**measured.columns, "seconds": seconds}

    kind = other.title if other else "half against half"
    subject = dict.fromkeys(("captions", "method", "steps", "guidance_scale"))
    subject = {"weights": f"{results.CONTROL} ({kind})", **subject, "n": n, "first": 0}
    result = ev.evaluate_row(subject, {"control": kind, **({"images": data.fingerprint()} if other else {})}, compute)
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
    by_class = {c: iter([k for k in pool if classes[k] == c]) for c in range(len(counts))}
    positions = [k for c in labels_by_frequency(counts, n) if (k := next(by_class[c], None)) is not None]
    used = set(positions)
    return positions + [k for k in pool if k not in used][: n - len(positions)]
