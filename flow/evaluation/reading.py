"""Images of a data set in a given order, decoded in threads, a batch ahead of whoever works on them."""

from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Protocol, cast

import torch
from torch import Tensor

import datasets
from flow.runtime.errors import error_context

THREADS = 4


class Data(Protocol):
    """A data set whose images are read one by one: uint8 [C, H, W] and a label."""

    labels: Any  # int64 [N], or None
    class_names: Any  # tuple[str, ...]
    image_shape: Any  # (C, H, W), or (2,) of points

    def fingerprint(self) -> str: ...
    def __len__(self) -> int: ...
    def __getitem__(self, index: int) -> tuple[Tensor, int]: ...


def build(**source: Any) -> Data:
    """`datasets.build` of a data set that is read in this way."""
    return cast(Data, datasets.build(**source))


def read_images(data: Data, batches: Iterable[Sequence[int]]) -> Iterator[tuple[Sequence[int], Tensor]]:
    """The given batches of indices, each with its images [b, C, H, W]. Raises UserError that names an unreadable file."""
    with ThreadPoolExecutor(THREADS) as pool:
        ahead: tuple[Sequence[int], list[Future]] | None = None
        for batch in [*batches, None]:
            following = (batch, [pool.submit(data.__getitem__, k) for k in batch]) if batch is not None else None
            if ahead:
                with error_context("data"):
                    images = torch.stack([future.result()[0] for future in ahead[1]])
                yield ahead[0], images
            ahead = following
