"""The global batch is a function of (seed, step): order, processes, micro-batches, flips, files."""

import multiprocessing
import os
import signal

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from configs.errors import UserError
from datasets.folder import Folder
from datasets.images import Images
from flow.losses import Batch
from flow.noise import gaussian_noise
from flow.sampling.images import to_uint8
from flow.training.data_loader import TrainingLoader, loss_noise


def numbered(n: int) -> Images:
    """Images of one row and three pixels: black, the number of the image, white. A flip leaves the number in place."""
    images = torch.zeros(n, 1, 1, 3, dtype=torch.uint8)
    images[:, 0, 0, 1], images[:, 0, 0, 2] = torch.arange(n), 255
    return Images(images, torch.arange(n) * 7, ())


def make(data, batch_size: int, **options) -> TrainingLoader:
    defaults = {
        "seed": 3, "gradient_accumulation_steps": 1, "rank": 0, "world_size": 1, "device": torch.device("cpu"),
        "horizontal_flip": False, "num_workers": 0,
    }  # fmt: skip
    return TrainingLoader(data, batch_size=batch_size, **{**defaults, **options})


def global_batch(batches: list[Batch], batch_size: int) -> tuple[Tensor, Tensor, list[int]]:
    """x1, labels and positions of the micro-batches of all processes, each put into the rows that it claims."""
    batches = sorted(batches, key=lambda batch: batch.rows.start)
    rows = [row for batch in batches for row in range(batch.rows.start, batch.rows.stop)]
    assert rows == list(range(batch_size))  # each row once
    positions = [position for batch in batches for position in batch.sample_ids]
    return torch.cat([batch.x1 for batch in batches]), torch.cat([batch.y for batch in batches]), positions


def numbers(x1: Tensor) -> list[int]:
    return to_uint8(x1)[:, 0, 0, 1].tolist()


def flipped(x1: Tensor) -> Tensor:
    return x1[:, 0, 0, 0] > 0


def test_a_micro_batch():
    (batch,) = next(make(numbered(5), 4).steps(2, 3))
    assert batch.x1.shape == (4, 1, 1, 3) and batch.x1.dtype == torch.float32
    assert batch.x1[:, 0, 0, 0].eq(-1).all() and batch.x1[:, 0, 0, 2].eq(1).all()  # 0 and 255
    assert batch.y.tolist() == [7 * k for k in numbers(batch.x1)]
    assert batch.rows == slice(0, 4) and batch.sample_ids == range(8, 12)


@pytest.mark.parametrize("batch_size", [1, 4, 10, 25])
def test_every_image_comes_once_an_epoch(batch_size):
    """10 images; batches of 4 straddle epochs, one of 25 holds two and a half of them."""
    steps = list(make(numbered(10), batch_size).steps(0, 100 // batch_size))
    stream = [k for (batch,) in steps for k in numbers(batch.x1)]
    epochs = [stream[i : i + 10] for i in range(0, 100, 10)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 10  # each in an order of its own
    assert [p for (batch,) in steps for p in batch.sample_ids] == list(range(100))


def test_stream_depends_on_seed_alone():
    """The stream depends on the seed, not on the batch size."""

    def stream(batch_size: int, seed: int) -> list[int]:
        return [
            k for (batch,) in make(numbered(10), batch_size, seed=seed).steps(0, 60 // batch_size) for k in numbers(batch.x1)
        ]

    assert stream(4, seed=3) == stream(15, seed=3) == stream(60, seed=3)
    assert stream(4, seed=3) != stream(4, seed=4)


@pytest.mark.parametrize("gradient_accumulation_steps", [1, 2])
@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_processes_share_one_global_batch(world_size, gradient_accumulation_steps):
    """Processes and micro-batches share one global batch."""
    data, step, batch_size = numbered(20), 5, 16  # step 5 holds positions 80 to 95
    (alone,) = next(make(data, batch_size, horizontal_flip=True).steps(step, step + 1))
    batches = []
    for rank in range(world_size):
        loader = make(
            data, batch_size, horizontal_flip=True, rank=rank, world_size=world_size,
            gradient_accumulation_steps=gradient_accumulation_steps,
        )  # fmt: skip
        (mine,) = loader.steps(step, step + 1)
        assert [len(batch.x1) for batch in mine] == [
            batch_size // world_size // gradient_accumulation_steps
        ] * gradient_accumulation_steps
        batches += mine
    x1, y, positions = global_batch(batches, batch_size)
    assert 0 < flipped(alone.x1).sum() < batch_size
    assert torch.equal(x1, alone.x1) and torch.equal(y, alone.y)
    assert positions == list(range(80, 96))


@pytest.mark.parametrize("first", [1, 2, 7])
def test_starting_at_a_step_equals_skipping_to_it(first):
    data = numbered(10)
    options = {"horizontal_flip": True, "gradient_accumulation_steps": 2}
    skipped = list(make(data, 4, **options).steps(0, 9))[first:]
    started = list(make(data, 4, **options).steps(first, 9))
    assert len(started) == 9 - first
    for one, other in zip(skipped, started, strict=True):
        for a, b in zip(one, other, strict=True):
            assert torch.equal(a.x1, b.x1) and torch.equal(a.y, b.y) and (a.rows, a.sample_ids) == (b.rows, b.sample_ids)


def test_a_loader_can_be_read_again_from_any_step():
    """The order of an epoch is kept between steps; going back must not find the wrong one."""
    loader = make(numbered(10), 4)
    first = [loader.indices(step).tolist() for step in (0, 3, 9)]
    assert [loader.indices(step).tolist() for step in (9, 0, 3)] == [first[2], first[0], first[1]]


def test_flips_depend_on_seed_and_step():
    """Flips are a function of seed and step; about half of the images are flipped."""
    n = 4000

    def flips(seed: int, step: int) -> Tensor:
        (batch,) = next(make(numbered(10), n, seed=seed, horizontal_flip=True).steps(step, step + 1))
        return flipped(batch.x1)

    assert torch.equal(flips(3, 1), flips(3, 1))
    for other in (flips(3, 2), flips(4, 1)):  # independent: half of them agree, to four standard deviations
        assert abs((other == flips(3, 1)).double().mean() - 0.5) < 4 * 0.5 / n**0.5
    assert abs(flips(3, 1).double().mean() - 0.5) < 4 * 0.5 / n**0.5
    (unflipped,) = next(make(numbered(10), n).steps(0, 1))
    assert not flipped(unflipped.x1).any()


def test_a_flip_mirrors_left_and_right_only():
    data = Images(torch.arange(6, dtype=torch.uint8).view(1, 1, 2, 3), None, ())
    (batch,) = next(make(data, 32, horizontal_flip=True).steps(0, 1))
    assert batch.y is None
    seen = {tuple(image.flatten().tolist()) for image in to_uint8(batch.x1)}
    assert seen == {(0, 1, 2, 3, 4, 5), (2, 1, 0, 5, 4, 3)}


@pytest.fixture
def folder(tmp_path) -> Folder:
    """7 images of noise in two classes."""
    pixels = np.random.default_rng(0).integers(0, 256, (7, 6, 5, 3), dtype=np.uint8)
    for i in range(7):
        path = tmp_path / ("a" if i < 3 else "b") / f"{i}.png"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(pixels[i]).save(path)
    return Folder(tmp_path, None, 3)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_files_read_by_workers_come_as_from_memory(folder, num_workers):
    """The same steps from the folder through a DataLoader and from its images in one tensor."""
    memory = Images(torch.stack([folder[i][0] for i in range(7)]), folder.labels, folder.class_names)
    options = {"horizontal_flip": True, "gradient_accumulation_steps": 2, "rank": 1, "world_size": 2}
    read = list(make(folder, 8, num_workers=num_workers, **options).steps(1, 5))
    held = list(make(memory, 8, **options).steps(1, 5))
    assert len(read) == len(held) == 4
    for one, other in zip(read, held, strict=True):
        for a, b in zip(one, other, strict=True):
            assert torch.equal(a.x1, b.x1) and torch.equal(a.y, b.y) and (a.rows, a.sample_ids) == (b.rows, b.sample_ids)
            assert a.y.dtype == torch.int64


def test_a_folder_without_classes_gives_no_labels(tmp_path):
    Image.new("L", (4, 4)).save(tmp_path / "a.png")
    (batch,) = next(make(Folder(tmp_path, None, 1), 2).steps(0, 1))
    assert batch.y is None and batch.x1.shape == (2, 1, 4, 4)


def test_workers_outlive_stop_signals(folder):
    """A launcher, a scheduler or `timeout` send SIGTERM to every process: the step is finished, then comes the checkpoint."""
    before = multiprocessing.active_children()
    steps = make(folder, 7, num_workers=1).steps(0, 40)
    next(steps)
    (worker,) = [process for process in multiprocessing.active_children() if process not in before]
    os.kill(worker.pid, signal.SIGTERM)
    os.kill(worker.pid, signal.SIGINT)
    for _ in range(20):  # more than it had read ahead
        next(steps)
    assert worker.is_alive() and worker.exitcode is None
    assert len(list(steps)) == 19


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_broken_file_is_named_from_a_worker_too(folder, num_workers):
    (folder.path / "b" / "4.png").write_bytes(b"")
    with pytest.raises(UserError, match=r"data\.args: .*4\.png: not a readable image"):
        list(make(folder, 7, num_workers=num_workers).steps(0, 1))


@pytest.mark.parametrize(
    ("batch_size", "world_size", "gradient_accumulation_steps", "near"),
    [(10, 4, 1, 8), (10, 2, 2, 8), (3, 4, 2, 8), (31, 1, 2, 32)],
)
def test_a_batch_that_does_not_divide(batch_size, world_size, gradient_accumulation_steps, near):
    message = rf"train\.batch_size={batch_size}: must be divisible by {world_size} .*"
    message += rf"train\.gradient_accumulation_steps={gradient_accumulation_steps}; {near} would"
    with pytest.raises(UserError, match=message):
        make(numbered(10), batch_size, world_size=world_size, gradient_accumulation_steps=gradient_accumulation_steps)
    make(numbered(10), near, world_size=world_size, gradient_accumulation_steps=gradient_accumulation_steps)


def test_noise_of_a_loss_is_not_that_of_x0():
    """Whatever key a loss of one's own chooses."""
    (batch,) = next(make(numbered(6), 6).steps(0, 1))
    noise = loss_noise({"train": (2,)}, 3, batch, torch.device("cpu"))["train"]
    assert noise.shape == (6, 2) and not torch.equal(noise, gaussian_noise("train", 3, batch.sample_ids, (2,)))
