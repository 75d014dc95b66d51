"""Labels and prompts of images by their index."""

from collections.abc import Sequence
from heapq import heapify, heappop, heappush
from itertools import cycle

import torch
from torch import Tensor

from configs.schema import Config
from datasets import captions
from flow.model import Network
from flow.sampling.settings import SamplerSettings

MAX_COLUMNS = 20  # of a picture, one for each condition


def preview_settings(
    config: Config, net: Network, class_names: Sequence[str], labels: tuple[int, ...] | None = None
) -> SamplerSettings:
    """The sampler of the previews of a training; a network with prompts gets one for each class. labels: in turn; None: all."""
    p = config.preview
    prompts = tuple(map(captions.plain, class_names)) if net.max_prompt_bytes else None
    return SamplerSettings(p.sampling_method, p.sampling_steps, p.guidance_scale, seed=p.seed, labels=labels, prompts=prompts)


def classes_with_images(labels: Tensor | None, num_classes: int | None) -> tuple[int, ...] | None:
    """The classes of the network that these labels [N] of a data set have, where they lack some; else None."""
    if labels is None or num_classes is None:
        return None
    classes = tuple(labels.unique().tolist())
    return classes if len(classes) < num_classes else None


def labels_for(indices: Sequence[int], settings: SamplerSettings, num_classes: int | None) -> Tensor | None:
    """Labels int64 [n] of the images with the given indices; None for a network without labels, unless the settings say
    what the prompts stand for."""
    if num_classes is None and not settings.labels:
        return None
    choices: Sequence[int] = settings.labels or range(num_classes or 0)
    return torch.tensor([choices[k % len(choices)] for k in indices])


def condition_names(settings: SamplerSettings, class_names: Sequence[str], num_classes: int | None) -> list[str]:
    """The prompts, or of each label the name of its class, else its number."""
    if settings.prompts:
        return list(settings.prompts)
    labels = settings.labels or range(num_classes or 0)
    return [class_names[k] if k < len(class_names) else str(k) for k in labels]


def column_names(settings: SamplerSettings, class_names: Sequence[str], num_classes: int | None) -> list[str]:
    """The `condition_names` where each gets a column of a picture; [] for fewer than 2 or more than MAX_COLUMNS."""
    names = condition_names(settings, class_names, num_classes)
    return names if 2 <= len(names) <= MAX_COLUMNS else []


def labels_by_frequency(counts: Sequence[int], n: int) -> list[int]:
    """The first n labels of a sequence that gives every class c its share p = counts[c] / sum(counts) from the start on: among
    the first k labels are at least floor(k p) and at most ceil(k p) of each class, for every k.

    A class may come again once its quota k p exceeds the number x of its labels so far, and among those that may, the one with
    the smallest (x + 1) / p comes: a house-monotone apportionment that satisfies quota (Balinski & Young 1979,
    doi:10.1287/moor.4.1.31). Labels from a to b differ from (b - a) p by less than 2 a class. Raises ValueError where no count
    is above 0.
    """
    total = sum(counts)
    if total <= 0:
        raise ValueError(f"counts={list(counts)}: a class with at least one image is needed")
    used = [0] * len(counts)
    waiting = [(0, c) for c, count in enumerate(counts) if count]  # (position from which the class may come again, class)
    heapify(waiting)
    eligible: list[tuple[float, int]] = []  # ((x + 1) / p, class)
    labels: list[int] = []
    for k in range(n):
        while waiting and waiting[0][0] <= k:
            _, c = heappop(waiting)
            heappush(eligible, ((used[c] + 1) * total / counts[c], c))
        _, c = heappop(eligible)
        labels.append(c)
        used[c] += 1
        heappush(waiting, (used[c] * total // counts[c], c))
    return labels


def conditions_in_turn(
    labels: Sequence[int] | None, captions: Sequence[Sequence[str]] | None
) -> tuple[tuple[int, ...] | None, tuple[str, ...] | None]:
    """Labels and prompts of images that take turns over these labels, with captions of each class over all: as many of each."""
    if captions is None:
        return tuple(labels) if labels else None, None
    by_class = [[(label, prompt) for prompt in captions[label]] for label in labels or range(len(captions))]
    pairs = [pair for one_of_each in zip(*by_class, strict=False) for pair in one_of_each]
    return tuple(label for label, _ in pairs), tuple(prompt for _, prompt in pairs)


def conditions_by_frequency(
    counts: Sequence[int], n: int, captions: Sequence[Sequence[str]] | None = None
) -> tuple[tuple[int, ...], tuple[str, ...] | None]:
    """Labels of n images by the frequency of the classes, and prompts: the captions of an image's class in turn."""
    labels = labels_by_frequency(counts, n)
    if captions is None:
        return tuple(labels), None
    turns = [cycle(texts) for texts in captions]
    return tuple(labels), tuple(next(turns[label]) for label in labels)
