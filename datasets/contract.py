"""What every data set keeps to, checked once when it is built: a mistake in a set of one's own would otherwise show as a loss
that is not finite, as gray samples, or not at all."""

import math
from typing import Any

import torch
from torch import Tensor

from datasets.images import Images
from datasets.latents import Latents
from datasets.packed import Packed
from datasets.pairs import Pairs
from flow.registry import kind_of

STORED = (Pairs, Latents, Packed)  # written by scripts: values of pairs leave [-1, 1], early ones have labels without names
FLOATS = (torch.float16, torch.float32, torch.float64)
TOLERANCE = 0.01  # beyond [-1, 1], for images that were resized or rounded


def check(name: str, data: Any) -> None:
    """Raises ValueError where the data set `name` holds something else than the protocol `datasets.DataSet` says. A doubt is a
    note of the data set.

    Cheap for large sets: of images only the shape and the kind are looked at, and the range where they are floats in memory.
    """
    key = f"name={name}"
    if not hasattr(data, "access"):
        raise ValueError(
            f"{key}: is built as {kind_of(data)}; return datasets.images.Images(images, labels, class_names), or an object of "
            "the protocol datasets.DataSet"
        )
    if data.access == "memory":
        _check_images(key, data)
    if not len(data):
        raise ValueError(f"{key}: holds no images; return at least one")
    _check_labels(key, data)


def _check_images(key: str, data: Any) -> None:
    images = data.images
    if not isinstance(images, Tensor):
        raise ValueError(f"{key}: images are {kind_of(images)}, must be a tensor; {_to_tensor(images, 'torch.stack(images)')}")
    dtype = str(images.dtype).removeprefix("torch.")
    if images.dtype != torch.uint8 and images.dtype not in FLOATS:
        raise ValueError(
            f"{key}: images are {dtype}, must be uint8 (0 to 255), or float32 in [-1, 1]; return images.to(torch.uint8), or "
            "scale them"
        )
    _check_shape(key, images)
    if images.dtype == torch.uint8 or not len(images):
        return
    low, high = (bound.item() for bound in images.aminmax())  # NaN where one value is NaN
    if not (math.isfinite(low) and math.isfinite(high)):
        bad = (~images.flatten(1).isfinite().all(1)).nonzero().flatten().tolist()
        remedy = "regenerate them" if isinstance(data, STORED) else "leave them out"
        raise ValueError(
            f"{key}: {len(bad)} of {len(images)} samples hold NaN or infinity, the first is number {bad[0]}; {remedy}"
        )
    if images.ndim == 2 or data.codec is not None or isinstance(data, STORED):  # points and latents have a range of their own
        return
    if low < -1 - TOLERANCE or high > 1 + TOLERANCE:
        remedy = "images.round().to(torch.uint8), or images / 127.5 - 1" if low >= 0 else "images that are scaled to [-1, 1]"
        raise ValueError(
            f"{key}: images are {dtype} from {low:g} to {high:g}, must be in [-1, 1], as networks see floats as they are; "
            f"return {remedy}"
        )
    note = (
        f"{key}: images are {dtype} from {low:g} to {high:g}, half of the range [-1, 1] that networks are made for; if 0 is "
        "black, return images * 2 - 1"
    )
    if low >= 0 and isinstance(data, Images) and note not in data.notes:  # a builder may return the same set twice
        data.notes = [*data.notes, note]


def _check_shape(key: str, images: Tensor) -> None:
    shape = list(images.shape)
    remedy = ""
    if images.ndim == 3:
        remedy = "; add the channel by images[:, None]"
    elif images.ndim == 2 and (images.dtype == torch.uint8 or shape[1] != 2):
        remedy = "; reshape flattened images"
    elif images.ndim == 4 and shape[3] in (1, 3, 4) and shape[1] > 4:  # no image is so narrow with so many channels
        remedy = "; move the channels by images.permute(0, 3, 1, 2)"
    elif images.ndim in (2, 4):
        return
    raise ValueError(f"{key}: images have the shape {shape}, must be [N, C, H, W], or points float32 [N, 2]{remedy}")


def _check_labels(key: str, data: Any) -> None:
    labels, names = data.labels, data.class_names
    if not isinstance(names, tuple | list) or not all(isinstance(name, str) for name in names):
        raise ValueError(f"{key}: class_names={names!r}: must be a tuple of strings, a name for each class")
    if labels is None:
        return
    if not isinstance(labels, Tensor):
        raise ValueError(f"{key}: labels are {kind_of(labels)}, must be a tensor; {_to_tensor(labels, 'torch.tensor(labels)')}")
    if labels.dtype != torch.int64:
        raise ValueError(f"{key}: labels are {str(labels.dtype).removeprefix('torch.')}, must be int64; return labels.long()")
    if list(labels.shape) != [len(data)]:
        raise ValueError(
            f"{key}: labels have the shape {list(labels.shape)}, must be [{len(data)}], as there are so many images; return "
            "one for each image"
        )
    low, high = (int(bound) for bound in labels.aminmax())
    if low < 0:
        raise ValueError(f"{key}: labels begin at {low}, must begin at 0; number the classes from 0, or return None as labels")
    if high >= len(names) and not isinstance(data, STORED):
        raise ValueError(
            f"{key}: labels go up to {high}, class_names has {len(names)} names; name each class from 0 to {high}, or return "
            "None as labels"
        )


def _to_tensor(value: Any, other: str) -> str:
    return f"return {'torch.from_numpy(...)' if type(value).__module__ == 'numpy' else other}"
