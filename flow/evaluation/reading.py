"""Images of a data set in a given order, decoded in threads, a batch ahead of whoever works on them."""

from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import chain, pairwise

import torch
from torch import Tensor

from datasets import DataSet
from flow.runtime.errors import error_context

THREADS = 4


def read_images(data: DataSet, batches: Iterable[Sequence[int]], key: str = "data") -> Iterator[tuple[Sequence[int], Tensor]]:
    """The given batches of indices, each with its images [b, C, H, W]. Raises UserError that names an unreadable file and the
    `key` or flag that the data set comes from."""
    with ThreadPoolExecutor(THREADS) as pool:
        submitted = ((batch, [pool.submit(data.__getitem__, k) for k in batch]) for batch in batches)
        for (batch, futures), _ in pairwise(chain(submitted, [((), [])])):  # the next one is submitted before this one is used
            with error_context(key):
                images = torch.stack([future.result()[0] for future in futures])
            yield batch, images
