"""Couplings: fresh noise, minibatch optimal transport within blocks and classes, matched pairs."""

import itertools
from types import SimpleNamespace

import pytest
import torch
from conftest import TINY_TRAIN
from PIL import Image

import datasets
from configs import loading
from flow import couplings
from flow.noise import gaussian_noise
from flow.runtime import distributed
from flow.source import GaussianSource
from flow.training.flow_task import FlowTask
from flow.training.logging import read_metrics

SHAPE, NOISE = (1, 2, 2), GaussianSource()


def cost(x0: torch.Tensor, x1: torch.Tensor) -> float:
    return (x0 - x1).square().sum().item()


def test_fresh_noise_by_position():
    x0 = couplings.build("independent", NOISE, 3, SHAPE, 8, {}).sample_x0([5, 2], [0, 1], torch.zeros(2, *SHAPE), None)
    assert torch.equal(x0, gaussian_noise("train", 3, [5, 2], SHAPE))


def test_the_assignment_is_the_cheapest_of_all():
    x1 = torch.randn(6, *SHAPE)
    ot = couplings.build("ot", NOISE, 0, SHAPE, 6, {"block": 6})
    x0 = ot.sample_x0(range(6), range(6), x1, None)
    fresh = gaussian_noise("train", 0, range(6), SHAPE)
    assert sorted(x0.flatten(1).tolist()) == sorted(fresh.flatten(1).tolist())  # the same draws in another order
    cheapest = min(cost(fresh[list(order)], x1) for order in itertools.permutations(range(6)))
    assert cost(x0, x1) == pytest.approx(cheapest)


def test_pairs_stay_within_a_class_and_a_block():
    x1, y = torch.randn(16, *SHAPE), torch.tensor([0, 1] * 8)
    fresh = gaussian_noise("train", 3, range(16), SHAPE).flatten(1).tolist()
    x0 = couplings.build("ot", NOISE, 3, SHAPE, 16, {"block": 8}).sample_x0(range(16), range(16), x1, y).flatten(1).tolist()
    came_from = [fresh.index(row) for row in x0]
    assert sorted(came_from) == list(range(16)) and came_from != list(range(16))
    assert all(row % 2 == source % 2 and row // 8 == source // 8 for row, source in enumerate(came_from))


def test_processes_find_the_same_pairs():
    x1 = torch.randn(16, *SHAPE)
    ot = couplings.build("ot", NOISE, 0, SHAPE, 8, {"block": 4})
    whole = ot.sample_x0(range(16), range(16), x1, None)
    shares = [ot.sample_x0(range(i, i + 8), range(i, i + 8), x1[i : i + 8], None) for i in (0, 8)]
    assert torch.equal(whole, torch.cat(shares))


def test_pairs_without_generated_ones_draw_nothing():
    """All images are real, and their noise is stored."""

    class NoNoise(GaussianSource):
        def draw(self, *_):
            raise AssertionError("drawn")

    noise = torch.randn(3, *SHAPE, generator=torch.Generator().manual_seed(0))
    pairs = SimpleNamespace(source={"name": "gaussian", "args": {}}, source_fingerprint=None, seed=0, generated=0, noise=noise)
    coupling = couplings.build("paired", NoNoise(), 0, SHAPE, 2, {}, pairs)
    assert torch.equal(coupling.sample_x0([5, 6], [2, 0], torch.zeros(2, *SHAPE), None), noise[[2, 0]])


def test_mistakes():
    with pytest.raises(ValueError, match="unknown coupling 'od'; choose from independent, ot, aligned, paired"):
        couplings.build("od", NOISE, 0, SHAPE, 8, {})
    with pytest.raises(ValueError, match="block=1: must be a whole number of at least 2"):
        couplings.build("ot", NOISE, 0, SHAPE, 8, {"block": 1})
    with pytest.raises(ValueError, match="independent has no argument 'block'"):
        couplings.build("independent", NOISE, 0, SHAPE, 8, {"block": 4})
    with pytest.raises(ValueError, match="block=64: must divide the 10 rows"):
        couplings.build("ot", NOISE, 0, SHAPE, 10, {})


def test_training_with_it(here, error, tmp_path, tiny_run):
    run = tmp_path / "run"
    here("train", *TINY_TRAIN, "-e", run, "flow.coupling=ot", "flow.coupling_args.block=16")
    loss, independent = (read_metrics(folder / "metrics.jsonl")[-1]["loss"] for folder in (run, tiny_run))
    assert 0 < loss < independent  # noise and data of a pair are closer
    message = error("train", *TINY_TRAIN, "-e", tmp_path / "other", "flow.coupling=ot", "flow.coupling_args.block=24")
    assert "flow.coupling=ot: block=24: must divide the 32 rows" in message and "set flow.coupling_args.block=16" in message


def test_an_unknown_coupling_is_one_line(error, tmp_path):
    message = error("train", *TINY_TRAIN, "-e", tmp_path / "run", "flow.coupling=od")
    assert "flow.coupling: unknown coupling 'od'; choose from independent, ot, aligned, paired" in message
    assert not (tmp_path / "run").exists()


@pytest.fixture
def positives(tmp_path) -> list[str]:
    """Arguments of a training on a folder of digits, with their negatives beside it, under the same names."""
    images = datasets.build("digits", None, {}).images[:16]
    for name, suffix, pixels in (("positives", "png", images), ("negatives", "bmp", 255 - images)):
        (tmp_path / name).mkdir()
        for k, image in enumerate(pixels):
            Image.fromarray(image[0].numpy()).save(tmp_path / name / f"{k:02d}.{suffix}")
    return [
        *TINY_TRAIN, "data.name=folder", f"data.args={{path: {tmp_path / 'positives'}, channels: 1}}", "data.num_workers=0",
        "flow.coupling=aligned", "model.args.num_classes=null", "train.batch_size=16", "train.steps=2",
    ]  # fmt: skip


@pytest.fixture
def negatives(tmp_path, positives) -> list[str]:
    """The source of an aligned training."""
    return ["flow.source.name=folder", f"flow.source.args={{path: {tmp_path / 'negatives'}, channels: 1}}"]


def test_aligned_samples_have_the_same_index(positives, negatives, here, tmp_path):
    """Each image starts at its own negative, in the order of the training."""
    config = loading.load(None, [word for word in [*positives, *negatives] if "=" in word])
    (batch,) = next(FlowTask(config, distributed.build_accelerator()).batches(0))
    assert batch.indices != sorted(batch.indices)
    assert torch.allclose(batch.x0, -batch.x1, atol=1e-6)
    here("train", *positives, *negatives, "-e", tmp_path / "run")
    assert len(read_metrics(tmp_path / "run" / "metrics.jsonl")) > 0


def test_packed_sets_have_left_out_the_same(positives, here, error, tmp_path):
    """Two gaps at different places leave the counts equal and pair the wrong images between them."""
    packed = []
    for name, damaged in (("positives", "03.png"), ("negatives", "05.bmp")):
        (tmp_path / name / damaged).write_bytes(b"no image")
        here(
            "pack_images",
            "--source",
            tmp_path / name,
            "--channels",
            "1",
            "--skip_damaged",
            "--save_dir",
            tmp_path / f"p_{name}",
        )
        packed.append(f"args={{path: {tmp_path / f'p_{name}'}}}")
    words = ["data.name=packed", f"data.{packed[0]}", "flow.source.name=packed", f"flow.source.{packed[1]}"]
    others = [word for word in positives if not word.startswith("data.")]
    line = error("train", *others, *words, "-e", tmp_path / "run")
    assert "flow.coupling=aligned: 03 was left out of one of the two packed sets" in line


def test_what_is_not_aligned_is_one_line(positives, negatives, error, tmp_path):
    def line(*words: str) -> str:
        return error("train", *positives, "-e", tmp_path / "run", *words)

    assert "flow.coupling=aligned: needs a data set as flow.source.name" in line()
    assert "flow.source.name=digits has 1,797 samples for 16 images" in line("flow.source.name=digits")
    assert "flow.coupling=aligned: aligned has no argument 'block'" in line(*negatives, "flow.coupling_args={block: 4}")
    assert "data.horizontal_flip=true: a mirrored image" in line(*negatives, "data.horizontal_flip=true")
    (tmp_path / "negatives/07.bmp").rename(tmp_path / "negatives/075.bmp")
    assert "image 7 is 07, its start 075; give both files the same name" in line(*negatives)
