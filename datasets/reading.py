"""Samples of a data set by their indices, read as its `access` says; see `datasets.DataSet`.

Training has two more ways to the same samples: files are decoded in worker processes, and a set in memory that fits on the
device is indexed there (flow/training/data_loader.py).
"""

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from itertools import chain, pairwise
from typing import Any

import torch
from torch import Tensor

THREADS = 4  # of a process, which decode files


def read(data: Any, indices: Sequence[int]) -> Tensor:
    """The samples [n, ...] with these indices of a `datasets.DataSet`, each as `data[k]` gives it.

    Raises ValueError or OSError that names an unreadable file.
    """
    return _started(data, indices)()


def read_batches(data: Any, batches: Iterable[Sequence[int]]) -> Iterator[tuple[Sequence[int], Tensor]]:
    """The given batches of indices, each with its samples [b, ...]. Threads read one batch ahead of the caller.

    Raises what `read` raises.
    """
    started = ((batch, _started(data, batch)) for batch in batches)
    for (batch, samples), _ in pairwise(chain(started, [((), None)])):  # the next one is started before this one is used
        yield batch, samples()


def _started(data: Any, indices: Sequence[int]) -> Callable[[], Tensor]:
    """Start to read; the function that comes back waits for the samples."""
    if data.access == "memory":
        rows = torch.tensor(indices, dtype=torch.int64)
        images = data.images.index_select(0, rows)  # several times faster than data.images[indices]
        return lambda: images
    if data.access == "files":
        futures = [_pool().submit(data.__getitem__, k) for k in indices]
        return lambda: torch.stack([future.result()[0] for future in futures])
    if data.access == "posterior":
        return _pool().submit(_means, data, indices).result
    return _pool().submit(data.read, indices).result


def _means(data: Any, indices: Sequence[int]) -> Tensor:
    """The means of the posteriors of latents, as their `data[k]`."""
    return data.normalised(data.moments(indices)[0].float())


@cache
def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(THREADS)


os.register_at_fork(after_in_child=_pool.cache_clear)  # a forked process has the pool but none of its threads
