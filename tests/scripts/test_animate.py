"""animate: moving images, and the likelihood of a flow of points."""

import re

import numpy as np
from PIL import Image

from scripts import animate


def test_the_way_of_images_from_noise(tmp_path, tiny_run, here):
    here("animate", "--weights", tiny_run, "--out", tmp_path, "--n", "20", "--frames", "4", "--guidance_scale", "2")
    with Image.open(tmp_path / "trajectory.gif") as moving:
        assert moving.n_frames == 4
        first = np.asarray(moving.convert("L"), dtype=float)
    assert first.std() > 50  # noise


def test_likelihood_by_both_divergences(points_flow, tmp_path, here, monkeypatch):
    monkeypatch.setattr(animate, "MAP_CELLS", 12)
    out = tmp_path / "out"
    printed = here(
        "animate", "--weights", points_flow("mixture", 1), "--out", out, "--figures", "likelihood", "--hutchinson_samples", "2"
    )
    exact, estimate = (float(x) for x in re.findall(r"mean absolute error ([\d.]+) nats", printed))
    assert exact > 0.3 and exact != estimate  # of a flow that has not been trained
    assert [p.name for p in out.iterdir()] == ["likelihood.png"]
