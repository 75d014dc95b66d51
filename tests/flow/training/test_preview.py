"""Previews during a training."""

import numpy as np
import pytest
import torch
from conftest import TINY_TRAIN

import datasets
from datasets.images import Images
from flow.sampling import Sampler, images, locate


def test_preview_has_averaged_weights(here, tmp_path):
    """The grid of the snapshot at preview.seed; the last weights, which have moved far, and another seed give another."""
    run = tmp_path / "run"
    fast = ["optimizer.lr=0.01", "optimizer.warmup_steps=0", "preview.seed=7", "preview.n_samples=10"]
    here("train", *TINY_TRAIN, *fast, "-e", run)
    samples = Sampler.load(locate.find(run), "cpu").sample(10, steps=1, method="heun", seed=7)
    expected = images.labelled_grid(samples, 10, [str(label) for label in range(10)])
    assert np.array_equal(images.read_png(run / "samples/step_00000004.png"), expected.permute(1, 2, 0))


def test_a_failed_preview_does_not_end_the_run(here, tmp_path):
    """Its numbers overflow at this guidance; the training goes on, and so does a resume."""
    run, overflow = tmp_path / "run", ["preview.guidance_scale=1e38", "preview.sampling_steps=3"]
    printed = here("train", *TINY_TRAIN, "-e", run, *overflow)
    assert "note: no preview at step 4: image 0: its numbers are not finite" in printed
    assert (run / "snapshots/step_00000004.safetensors").is_file() and not list(run.glob("samples/*.png"))
    assert "no preview at step 4" in here("train", "-e", run, "-r", "latest")
    here("train", "-e", run, "-r", "latest", "preview.guidance_scale=2")
    assert [p.name for p in run.glob("samples/*.png")] == ["step_00000004.png"]


@pytest.mark.parametrize(("channels", "shown"), [(2, 1), (4, 3), (5, 3)])
def test_pictures_of_other_numbers_of_channels(here, error, monkeypatch, tmp_path, channels, shown):
    """Previews and the grid of sample.py show the first three channels, or one; its images have all, up to four."""

    def colors(root):
        return Images(torch.randint(256, (64, channels, 8, 8), dtype=torch.uint8), torch.arange(64) % 10, tuple("0123456789"))

    monkeypatch.setitem(datasets.DATASETS, "colors", colors)
    run, note = tmp_path / "run", f"note: pictures show the first {shown} of {channels} channels"
    here("train", *TINY_TRAIN, "data.name=colors", "data.args={}", "-e", run, "train.log_with=[tensorboard]")
    assert note in (run / "log.txt").read_text()
    assert images.read_png(run / "samples/step_00000004.png").shape[2] == shown
    ask = ["--weights", run, "--n_samples", "10", "--sampling_steps", "1", "--save_dir", tmp_path / "out"]
    if channels > 4:
        assert f"makes images of {channels} channels, a PNG file has at most 4" in error("sample", *ask)
        return
    assert note in here("sample", *ask, "--npz")
    assert images.read_png(tmp_path / "out/grid.png").shape[2] == shown
    assert np.load(tmp_path / "out/samples.npz")["arr_0"].shape == (10, 8, 8, channels)
