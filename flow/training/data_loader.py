"""The global batch of a training step as a function of (seed, step), and this process's share of it.

Position p of the endless stream of training images (step k holds sample_ids k B .. (k + 1) B - 1) is image
`permutation(seed, epoch)[p mod N]` of epoch p // N. Processes and micro-batches take consecutive rows of the batch, so
any number of them sees the same global batches, and resuming needs the step alone.
"""

import signal
import threading
from collections.abc import Generator, Iterable, Iterator
from itertools import tee
from queue import Queue
from typing import TypeVar

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from configs.schema import Config, UserError
from configs.vae import VaeConfig
from flow.losses import Batch
from flow.noise import gaussian_noise, generator
from flow.runtime.shutdown import SIGNALS
from flow.sampling.images import to_float
from flow.sampling.space import Space


class TrainingLoader:
    """Iterates over training steps: each item is the list of this process's micro-batches."""

    def __init__(
        self,
        data,
        *,
        seed: int,
        batch_size: int,
        gradient_accumulation_steps: int,
        rank: int,
        world_size: int,
        device: torch.device,
        horizontal_flip: bool,
        num_workers: int,
    ):
        """data: Images or Pairs (held on the device where they take less than a quarter of its free memory), Folder or
        Latents.

        Raises UserError where the global batch does not divide by processes x micro-batches, and for flips of points and of
        latents that have no flipped copies.
        """
        self.micro_batch_size = micro_batch_size(batch_size, world_size, gradient_accumulation_steps)
        self.data, self.seed, self.batch_size = data, seed, batch_size
        self.gradient_accumulation_steps = gradient_accumulation_steps
        self.rank, self.world_size = rank, world_size
        self.device, self.horizontal_flip, self.num_workers = device, horizontal_flip, num_workers
        self.latent = data.access == "posterior"
        if horizontal_flip and Space(data.image_shape, data.codec).is_points:
            raise UserError("data.horizontal_flip=true: points have no mirror image; set it to false")
        if self.latent and horizontal_flip and not data.has_flipped:
            raise UserError("data.horizontal_flip=true: these latents have no flipped copies; make them with --flipped yes")
        self.in_memory = data.access == "memory"
        if self.in_memory:
            images, fits = data.images, True
            if device.type == "cuda":
                fits = images.nbytes < torch.cuda.mem_get_info(device)[0] / 4
            self.images = images.to(device) if fits else images.pin_memory()
            self.labels = data.labels.to(self.images.device) if data.labels is not None else None

    @classmethod
    def of(cls, accelerator: Accelerator, config: Config | VaeConfig, data) -> "TrainingLoader":
        """That of a trainer, on its process."""
        return cls(
            data, seed=config.seed, batch_size=config.train.batch_size,
            gradient_accumulation_steps=config.train.gradient_accumulation_steps,
            rank=accelerator.process_index, world_size=accelerator.num_processes, device=accelerator.device,
            horizontal_flip=config.data.horizontal_flip, num_workers=config.data.num_workers,
        )  # fmt: skip

    def steps(self, first: int, last: int) -> Iterator[list[Batch]]:
        """The micro-batches of steps first .. last - 1."""
        index_batches, lookahead = tee(self._index_batches(first, last))  # workers read ahead of what is handed out
        fetched: Iterator[tuple[Tensor | None, Tensor | None]]
        if self.in_memory or self.latent:
            fetched = map(self._select, lookahead)
        else:
            fetched = self._read(lookahead, (last - first) * self.gradient_accumulation_steps)
        for step in range(first, last):
            micro_batches = range(self.gradient_accumulation_steps)
            yield [self._micro_batch(step, m, next(index_batches), *next(fetched)) for m in micro_batches]

    def row_slice(self, micro: int) -> slice:
        """Rows of the global batch that are this process's micro-batch number `micro`."""
        start = (micro * self.world_size + self.rank) * self.micro_batch_size
        return slice(start, start + self.micro_batch_size)

    def indices(self, step: int) -> np.ndarray:
        """Data set indices [B] of the global batch of a step; every image comes once an epoch."""
        n, start = len(self.data), step * self.batch_size
        parts, position = [], start
        while position < start + self.batch_size:  # a batch may straddle epochs, or hold several of a tiny set
            epoch, offset = divmod(position, n)
            take = min(n - offset, start + self.batch_size - position)
            parts.append(self._permutation(epoch)[offset : offset + take])
            position += take
        return np.concatenate(parts)

    def _permutation(self, epoch: int) -> np.ndarray:
        if getattr(self, "_epoch", None) != epoch:
            self._epoch, self._order = epoch, generator("order", self.seed, epoch).permutation(len(self.data))
        return self._order

    def _index_batches(self, first: int, last: int) -> Iterator[list[int]]:
        for step in range(first, last):
            indices = self.indices(step)
            for micro in range(self.gradient_accumulation_steps):
                yield indices[self.row_slice(micro)].tolist()

    def _select(self, indices: list[int]) -> tuple[Tensor | None, Tensor | None]:
        if self.latent:  # drawn when the step is known
            return None, self.data.labels[indices] if self.data.labels is not None else None
        index = torch.tensor(indices, device=self.images.device)
        return self.images[index], self.labels[index] if self.labels is not None else None

    def _read(self, index_batches: Iterator[list[int]], count: int) -> Iterator[tuple[Tensor | None, Tensor | None]]:
        loader: DataLoader = DataLoader(
            _SafeDataset(self.data),
            batch_sampler=_Sampler(index_batches, count),
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
            x1 = to_float(images.to(self.device, non_blocking=True))
            if mirrored is not None:
                flip = torch.from_numpy(mirrored).to(self.device, non_blocking=True)
                x1 = torch.where(flip[:, None, None, None], x1.flip(-1), x1)
        y = labels.to(self.device, non_blocking=True) if labels is not None else None
        return Batch(x1, None, y, None, step, rows, sample_ids, indices)

    def _sample_posterior(self, indices: list[int], sample_ids: range, mirrored: np.ndarray | None) -> Tensor:
        """Latents [b, C, h, w] drawn from their posteriors with noise that is a function of (seed, position)."""
        moments = self.data.moments(indices, None if mirrored is None else mirrored.tolist())
        noise = gaussian_noise("posterior", self.seed, sample_ids, self.data.image_shape)
        mean, std, noise = (part.to(self.device, non_blocking=True).float() for part in (*moments, noise))
        return self.data.normalised(mean + std * noise)


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


class _Sampler:
    """The batch sampler that torch asks for: an iterable with a length."""

    def __init__(self, index_batches: Iterator[list[int]], count: int):
        self.index_batches, self.count = index_batches, count

    def __iter__(self) -> Iterator[list[int]]:
        return self.index_batches

    def __len__(self) -> int:
        return self.count


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
    """They often reach the whole process group; it is the trainer that decides when to stop."""
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
    queue: Queue[tuple[bool, object]] = Queue()
    semaphore, stop_event = threading.Semaphore(depth), threading.Event()

    def work() -> None:
        try:
            for item in items:
                queue.put((True, item))
                semaphore.acquire()
                if stop_event.is_set():
                    return
            queue.put((False, None))
        except BaseException as error:
            queue.put((False, error))

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    try:
        while True:
            more, item = queue.get()
            if not more:
                if item is not None:
                    raise item  # type: ignore[misc]
                return
            yield item  # type: ignore[misc]
            semaphore.release()
    finally:
        stop_event.set()
        semaphore.release()
        thread.join()
