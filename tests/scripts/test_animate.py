"""animate: moving images, and the likelihood of a flow of points."""

import re

import numpy as np
import pytest
import torch
from PIL import Image

from flow.evaluation import animation
from flow.sampling import snapshot
from scripts import animate


def test_the_way_of_images_from_noise(tmp_path, tiny_run, here):
    """The last frame is the grid that sample.py makes with as many steps, but for the colors of a GIF and the bar below."""
    snap, weights = snapshot.load(tiny_run), tmp_path / "moving.safetensors"
    torch.manual_seed(0)  # the weights of the run have hardly moved from those of a network that predicts 0
    moved = {name: value + 0.1 * torch.randn_like(value) for name, value in snap.weights.items()}
    snapshot.save(weights, moved, snap.config, snap.image_shape, snap.step, 10, class_names=snap.class_names)
    guided = ["--weights", weights, "--guidance_scale", "2"]
    here("animate", *guided, "--out", tmp_path, "--n", "20", "--frames", "4", "--steps_a_frame", "2")
    with Image.open(tmp_path / "trajectory.gif") as moving:
        assert moving.n_frames == 4
        first = np.asarray(moving.convert("L"), dtype=float)
        moving.seek(3)
        last = np.asarray(moving.convert("L"), dtype=float)
    assert first.std() > 50  # noise
    steps = ["--sampling_method", "heun", "--sampling_steps", "6"]
    here("sample", *guided, *steps, "--n_samples", "20", "--save_dir", tmp_path / "samples")
    grid = np.asarray(Image.open(tmp_path / "samples/grid.png").convert("L"), dtype=float)
    height, width = grid.shape
    assert last.shape == (height + animation.BAR_HEIGHT, width)
    assert np.abs(last[:height] - grid).max() < 10 < np.abs(first[:height] - grid).mean()


def test_likelihood_by_both_divergences(points_flow, tmp_path, here, monkeypatch):
    monkeypatch.setattr(animate, "MAP_CELLS", 12)
    out = tmp_path / "out"
    out.mkdir()
    (out / "flow.gif").write_bytes(b"of an earlier call")
    printed = here(
        "animate", "--weights", points_flow("mixture", 1), "--out", out, "--figures", "likelihood", "--hutchinson_samples", "2"
    )
    exact, estimate = (float(x) for x in re.findall(r"mean absolute error ([\d.]+) nats", printed))
    assert exact > 0.3 and exact != estimate  # of a flow that has not been trained
    assert {p.name for p in out.iterdir()} == {"flow.gif", "likelihood.png"}
    assert f"note: {out} also holds figures of an earlier call, perhaps of other weights: flow.gif" in printed


@pytest.mark.parametrize("flag", [["--figures", "flow"], ["--hutchinson_samples", "2"]])
def test_flags_of_figures_that_are_not_drawn(flag, points_flow, tiny_run, tmp_path, error):
    out = ["--out", tmp_path / "out"]
    assert f"{flag[0]}: is for flows of points" in error("animate", "--weights", tiny_run, *out, *flag)
    grids = ["animate", "--weights", points_flow("moons", 1), *out, "--trajectory_grids", *flag]
    assert f"{flag[0]}: does not go with --trajectory_grids" in error(*grids)
    points = ["animate", "--weights", points_flow("mixture", 1), *out, "--figures"]
    assert "--hutchinson_samples: is for --figures likelihood" in error(*points, "flow", "--hutchinson_samples", "2")
    assert "--frames: is for --figures flow and density" in error(*points, "likelihood", "--frames", "3")
    assert not (tmp_path / "out").exists()
