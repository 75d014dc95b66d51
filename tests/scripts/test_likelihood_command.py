"""scripts.likelihood: bits per dimension of images, nats of points, what is refused."""

import re

import numpy as np
import pytest
import torch

import datasets
from flow.likelihood import bits_per_dimension, dequantize
from flow.noise import generator
from flow.sampling import Sampler


def test_points_are_scored_in_nats(tmp_path, here):
    """Points have no levels, hence no bits."""
    small = ["train.steps=20", "train.batch_size=64", "data.args.n=500", "preview.n_samples=20", "train.log_with=[]"]
    here("train", "-c", "configs/toy_mixture.yaml", "-e", tmp_path / "toy", *small)
    printed = here("likelihood", "--weights", tmp_path / "toy", "--n_images", "8")
    nats = float(re.search(r"(-?[\d.]+) ± [\d.]+ nats a point", printed).group(1))
    assert "bits" not in printed
    points = datasets.build("toys", None, {"name": "mixture", "n": 500}).images[:8]
    exact = Sampler.load(tmp_path / "toy", "cpu").log_likelihood(points).mean().item()
    assert nats == pytest.approx(exact, abs=0.03)  # one random direction for each point


def test_command(here, tiny_run):
    """The bits of an image depend on the place within its levels, a function of seed and index."""
    printed = here("likelihood", "--weights", tiny_run, "--n_images", "4", "--bspp", "2")
    bits = float(re.search(r"([\d.]+) ± [\d.]+ bits per dimension", printed).group(1))
    u = torch.from_numpy(np.stack([generator("likelihood", 0, k).random((1, 8, 8)) for k in range(4)]))
    digits = datasets.build("digits", None, {})
    sampler, labels = Sampler.load(tiny_run, "cpu"), digits.labels[:4].tolist()
    x1 = dequantize(digits.images[:4], u)
    log_p = sampler.log_likelihood(x1, labels=labels, hutchinson_samples=1, seed=0, rtol=1e-3, atol=1e-3)
    assert bits == pytest.approx(bits_per_dimension(log_p, 64).mean().item(), abs=6e-5)  # four digits are printed
    least, most = re.search(r"NFE (\d+)(?: to (\d+))?, 1 Hutchinson", printed).groups()  # of the batches
    assert 7 <= int(least) <= int(most or least)


def test_held_out_images_have_bits_of_their_own(here, error, tiny_run):
    """--test takes the split that the training has not seen; digits without a split have none."""
    command = ["likelihood", "--weights", tiny_run, "--n_images", "2", "--rtol", "0.5", "--atol", "0.5"]
    given = (["data.args.split=train"], ["data.args.split=train", "--test"], ["data.args.split=test"])
    train, held_out, test = (re.findall(r"[\d.]+ ± [\d.]+ bits per dimension", here(*command, *more)) for more in given)
    assert len(train) == 1 and train != held_out == test
    line = error(*command, "--test")
    assert "--test: data.name=digits" in line and "has no held-out images" in line


def test_data_of_another_size_are_refused(error, tiny_run):
    line = error("likelihood", "--weights", tiny_run, "--n_images", "2", "data.name=toys", "data.args={name: rings}")
    assert "data: toys has images of (2,), --weights is of (1, 8, 8)" in line
