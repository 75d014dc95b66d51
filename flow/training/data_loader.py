"""The global batch of a training step as a function of (seed, step), and this process's share of it.

Position p of the endless stream of training images (step k holds sample_ids k B .. (k + 1) B - 1) is image
`permutation(seed, epoch)[p mod N]` of epoch p // N. Processes and micro-batches take consecutive rows of the batch, so
any number of them sees the same global batches, and resuming needs the step alone.
"""

import signal
from collections import deque
from collections.abc import Generator, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from itertools import tee
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from configs.errors import UserError
from configs.schema import Config
from configs.vae import VaeConfig
from datasets import reading
from datasets.folder import Folder
from datasets.images import to_float
from flow.losses import Batch
from flow.noise import gaussian_noise, generator
from flow.runtime import commands, distributed
from flow.runtime.shutdown import SIGNALS
from flow.sampling.space import Space


@dataclass
class TrainingLoader:
    """Iterates over training steps: each item is the list of this process's micro-batches.

    Raises UserError where the global batch does not divide by processes x micro-batches, and for flips of points and of
    latents that have no flipped copies.
    """

    data: Any  # a `datasets.DataSet`
    seed: int
    batch_size: int  # of the global batch
    gradient_accumulation_steps: int
    rank: int
    world_size: int
    device: torch.device
    horizontal_flip: bool
    num_workers: int

    def __post_init__(self):
        data, device = self.data, self.device
        self.micro_batch_size = micro_batch_size(self.batch_size, self.world_size, self.gradient_accumulation_steps)
        if self.horizontal_flip and Space(data.image_shape, data.codec).is_points:
            raise UserError("data.horizontal_flip=true: points have no mirror image; set it to false")
        if data.access == "posterior" and self.horizontal_flip and not data.has_flipped:
            raise UserError("data.horizontal_flip=true: these latents have no flipped copies; make them with --flipped yes")
        self._on_device: tuple[Tensor, Tensor | None] | None = None  # images and labels
        if data.access == "memory" and _fits(data.images, device):
            self._on_device = data.images.to(device), data.labels.to(device) if data.labels is not None else None

    @classmethod
    def of(cls, accelerator: Accelerator, config: Config | VaeConfig, data, on_cpu: bool = False) -> "TrainingLoader":
        """The loader of this process, by the configuration. on_cpu: x1 and y stay there, for whoever reads their values without
        waiting for the device."""
        return cls(
            data, seed=config.seed, batch_size=config.train.batch_size,
            gradient_accumulation_steps=config.train.gradient_accumulation_steps,
            rank=accelerator.process_index, world_size=accelerator.num_processes,
            device=torch.device("cpu") if on_cpu else accelerator.device,
            horizontal_flip=config.data.horizontal_flip, num_workers=config.data.num_workers,
        )  # fmt: skip

    def steps(self, first: int, last: int) -> Iterator[list[Batch]]:
        """The micro-batches of steps first .. last - 1."""
        index_batches, lookahead = tee(self._index_batches(first, last))  # workers read ahead of what is handed out
        fetched = self._decoded(lookahead) if self.data.access == "files" else map(self._read, lookahead)
        for step in range(first, last):
            micro_batches = range(self.gradient_accumulation_steps)
            yield [self._micro_batch(step, m, next(index_batches), *next(fetched)) for m in micro_batches]

    def row_slice(self, micro: int) -> slice:
        """Rows of the global batch that are this process's micro-batch number `micro`."""
        start = (micro * self.world_size + self.rank) * self.micro_batch_size
        return slice(start, start + self.micro_batch_size)

    def indices(self, step: int) -> np.ndarray:
        """Data set indices [B] of the global batch of a step; every image comes once an epoch."""
        n = len(self.data)
        start = step * self.batch_size
        parts = []
        position = start
        while position < start + self.batch_size:  # a batch may straddle epochs, or hold several of a tiny set
            epoch, offset = divmod(position, n)
            take = min(n - offset, start + self.batch_size - position)
            parts.append(_permutation(self.seed, epoch, n)[offset : offset + take])
            position += take
        return np.concatenate(parts)

    def _index_batches(self, first: int, last: int) -> Iterator[list[int]]:
        for step in range(first, last):
            indices = self.indices(step)
            for micro in range(self.gradient_accumulation_steps):
                yield indices[self.row_slice(micro)].tolist()

    def _read(self, indices: list[int]) -> tuple[Tensor | None, Tensor | None]:
        if self._on_device:
            images, labels = self._on_device
            index = distributed.to_device(torch.tensor(indices), self.device)
            return images[index], labels[index] if labels is not None else None
        labels = self.data.labels[indices] if self.data.labels is not None else None
        if self.data.access == "posterior":  # drawn when the step is known
            return None, labels
        return reading.read(self.data, indices), labels

    def _decoded(self, index_batches: Iterator[list[int]]) -> Iterator[tuple[Tensor | None, Tensor | None]]:
        """The images of files, which worker processes decode ahead."""
        loader: DataLoader = DataLoader(
            _SafeDataset(self.data),
            batch_sampler=index_batches,
            num_workers=self.num_workers,
            collate_fn=_collate,
            worker_init_fn=_ignore_signals,
            pin_memory=self.device.type == "cuda",
        )
        for batch in loader:
            if isinstance(batch, str):
                raise UserError(f"data.args: {batch}")
            images, labels = batch
            yield images, labels if self.data.labels is not None else None

    def _micro_batch(self, step: int, micro: int, indices: list[int], images: Tensor | None, labels: Tensor | None) -> Batch:
        rows = self.row_slice(micro)
        start = step * self.batch_size
        sample_ids = range(start + rows.start, start + rows.stop)
        mirrored = None
        if self.horizontal_flip:
            mirrored = generator("flip", self.seed, step).random(self.batch_size)[rows] < 0.5
        if images is None:
            x1 = self._sample_posterior(indices, sample_ids, mirrored)
        else:
            x1 = to_float(distributed.to_device(images, self.device))
            if mirrored is not None:
                flip = distributed.to_device(torch.from_numpy(mirrored), self.device)
                x1 = torch.where(flip[:, None, None, None], x1.flip(-1), x1)
        y = distributed.to_device(labels, self.device) if labels is not None else None
        return Batch(x1, None, y, None, step, rows, sample_ids, indices)

    def _sample_posterior(self, indices: list[int], sample_ids: range, mirrored: np.ndarray | None) -> Tensor:
        """Latents [b, C, h, w] drawn from their posteriors with noise that is a function of (seed, position)."""
        moments = self.data.moments(indices, None if mirrored is None else mirrored.tolist())
        noise = gaussian_noise("posterior", self.seed, sample_ids, self.data.image_shape)
        mean, std, noise = (distributed.to_device(part, self.device).float() for part in (*moments, noise))
        return self.data.normalised(mean + std * noise)


def _fits(images: Tensor, device: torch.device) -> bool:
    """Whether a device with memory of its own has room for the images: a quarter of what is free on a GPU."""
    if device.type == "cuda":
        return images.nbytes < torch.cuda.mem_get_info(device)[0] / 4
    return device.type != "cpu"


@lru_cache(maxsize=2)
def _permutation(seed: int, epoch: int, n: int) -> np.ndarray:
    return generator("order", seed, epoch).permutation(n)


def loss_noise(draws: dict[str, tuple[int, ...]], seed: int, batch: Batch, device: torch.device) -> dict[str, Tensor]:
    """The noise of the `draws` of a loss [b, *shape], on the device: functions of (key, seed, sample id)."""
    # named apart from the other streams of a training: a loss may call its noise "train", as x0 is called
    noise = {key: gaussian_noise(f"loss {key}", seed, batch.sample_ids, shape) for key, shape in draws.items()}
    return {key: distributed.to_device(value, device) for key, value in noise.items()}


def packing_notes(data: Any) -> list[str]:
    """For a folder of images: how to decode them once and not in each epoch."""
    if not isinstance(data, Folder):
        return []
    flags = ["--size", str(data.size)] if data.size is not None else []
    flags += ["--channels", str(data.channels)] if data.channels != 3 else []
    pack: list[str | Path] = ["-m", "scripts.pack_images", "--source", data.path, *flags, "--save_dir", f"{data.path}_packed"]
    return [f"images are decoded in each epoch; pack them once for data.name=packed with: {commands.command(*pack)}"]


def micro_batch_size(batch_size: int, world_size: int, gradient_accumulation_steps: int) -> int:
    """Images that a process takes at once. Raises UserError where the global batch does not divide."""
    shares = world_size * gradient_accumulation_steps
    if batch_size % shares:
        near = max(1, round(batch_size / shares)) * shares
        raise UserError(
            f"train.batch_size={batch_size}: must be divisible by {world_size} process(es) x "
            f"train.gradient_accumulation_steps={gradient_accumulation_steps}; {near} would"
        )
    return batch_size // shares


class _SafeDataset(Dataset):
    """A data set whose errors travel as text: a worker's exception would arrive as a traceback."""

    def __init__(self, data):
        self.data = data

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int):
        try:
            return self.data[index]
        except (ValueError, OSError) as error:
            return str(error)


def _ignore_signals(worker: int) -> None:
    """Signals often reach the whole process group, and the trainer decides when to stop."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def _collate(items: list) -> tuple[Tensor, Tensor] | str:
    for item in items:
        if isinstance(item, str):
            return item
    images, labels = zip(*items, strict=True)
    return torch.stack(images), torch.tensor(labels)


T = TypeVar("T")


def prefetch(items: Iterable[T], depth: int) -> Generator[T, None, None]:
    """The items in their order, made by a thread up to `depth` before they are requested; 0 makes each when it is.

    An error of the thread comes out where its item was expected. Leaving early ends the thread.
    """
    if not depth:
        yield from items
        return
    iterator, end = iter(items), object()
    pool = ThreadPoolExecutor(1)
    try:
        ahead = deque(pool.submit(next, iterator, end) for _ in range(depth))
        while (item := ahead.popleft().result()) is not end:
            ahead.append(pool.submit(next, iterator, end))
            yield item  # type: ignore[misc]
    finally:
        pool.shutdown(cancel_futures=True)
