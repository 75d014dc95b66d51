"""animate: moving images, and the likelihood of a flow of points."""

import re

import numpy as np
import pytest
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


@pytest.mark.parametrize("flag", [["--figures", "flow"], ["--hutchinson_samples", "2"]])
def test_flags_of_figures_that_are_not_drawn(flag, points_flow, tiny_run, tmp_path, error):
    out = ["--out", tmp_path / "out"]
    assert f"{flag[0]}: is for flows of points" in error("animate", "--weights", tiny_run, *out, *flag)
    grids = ["animate", "--weights", points_flow("moons", 1), *out, "--trajectory_grids", *flag]
    assert f"{flag[0]}: does not go with --trajectory_grids" in error(*grids)
    assert not (tmp_path / "out").exists()
