"""Samples by index: the same from memory, files and disk, and for latents, as one by one."""

import multiprocessing

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from datasets import DataSet, reading
from datasets.encoded import UnreadableImage
from datasets.folder import Folder
from datasets.images import Images
from datasets.latents import Latents
from datasets.packed import Packed

ORDER = [6, 0, 3, 3, 5]
PIXELS = torch.arange(7 * 3 * 4 * 5, dtype=torch.uint8).view(7, 3, 4, 5)
ACCESS = ("memory", "files", "disk", "posterior")


@pytest.fixture
def sets(tmp_path) -> dict[str, DataSet]:
    """A data set of 7 samples for each kind of access."""
    (tmp_path / "folder").mkdir()
    for k, image in enumerate(PIXELS):
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(tmp_path / "folder" / f"{k}.png")
    paths = [tmp_path / "0.safetensors", tmp_path / "1.safetensors"]
    for path, images in zip(paths, PIXELS.split(4), strict=True):
        save_file({"images": images.contiguous()}, path)
    moments = torch.randn(7, 4, 2, 2, generator=torch.Generator().manual_seed(0)).half()
    shards = [{"mean": part, "std": part.abs()} for part in moments.split(4)]
    codec = {"shift": [0.1, 0.2, 0.3, 0.4], "scale": [3.0, 0.7, 1.1, 0.9]}
    return {
        "memory": Images(PIXELS, None, ()),
        "files": Folder(tmp_path / "folder", None, 3),
        "disk": Packed(paths, [4, 3], (3, 4, 5), None, (), ""),
        "posterior": Latents(shards, 4, None, (), codec, ""),
    }


@pytest.mark.parametrize("access", ACCESS)
def test_samples_are_those_of_one_by_one(sets, access):
    data = sets[access]
    assert data.access == access
    assert torch.equal(reading.read(data, ORDER), torch.stack([data[k][0] for k in ORDER]))


@pytest.mark.parametrize("access", ACCESS)
def test_batches_come_in_their_order(sets, access):
    """Indices of any kind of sequence, and batches of any length."""
    batches = [range(2, 5), [6], (0, 1, 0, 1)]
    read = list(reading.read_batches(sets[access], batches))
    assert [batch for batch, _ in read] == batches
    for batch, samples in read:
        assert torch.equal(samples, torch.stack([sets[access][k][0] for k in batch]))


def test_memory_is_not_read_one_by_one():
    class Whole(Images):
        def __getitem__(self, index):
            raise AssertionError("one sample")

    assert torch.equal(reading.read(Whole(PIXELS, None, ()), ORDER), PIXELS[ORDER])


def test_an_unreadable_file_is_named_in_its_batch(sets, tmp_path):
    """Batches before it come out."""
    (tmp_path / "folder/4.png").write_bytes(b"")
    batches = reading.read_batches(sets["files"], [range(0, 4), range(4, 7)])
    assert torch.equal(next(batches)[1], PIXELS[:4])
    with pytest.raises(UnreadableImage, match=r"4\.png: not a readable image"):
        next(batches)


def test_a_forked_process_reads_files_too(sets):
    """It has none of the threads of its parent."""
    reading.read(sets["files"], 20 * ORDER)  # which takes all threads
    child = multiprocessing.get_context("fork").Process(target=reading.read, args=(sets["files"], ORDER))
    child.start()
    child.join(20)
    child.kill()
    assert child.exitcode == 0
