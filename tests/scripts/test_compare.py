"""compare: flows of points side by side, and what it refuses."""

import os
import re
import shutil

import numpy as np
import pytest
import torch
from conftest import POINTS
from PIL import Image

import datasets
from flow.evaluation.metrics_2d import sliced_wasserstein
from scripts import compare


def test_flows_side_by_side(points_flow, tmp_path, here):
    a, b, out = points_flow("moons", 1), points_flow("moons", 2), tmp_path / "out"
    flags = ["--n_samples", "300", "--frames", "3", "--sampling_steps", "1", "4", "--names", "lr=1e-3", "lr=2e-3"]
    printed = here("compare", "--weights", a, b, *flags, "--out", out)
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in printed.splitlines() if line.startswith("|")][2:]
    assert [row[:4] for row in rows] == [[name, "euler", n, n] for n in "14" for name in ("lr=1e-3", "lr=2e-3")]
    assert (out / "compare.md").read_text().strip() in printed
    with Image.open(out / "compare.gif") as moving, Image.open(out / "compare.png") as still:
        assert moving.n_frames == 3 and still.width > 800
    here("sample", "--weights", a, "--n_samples", "300", "--sampling_steps", "4", "--save_dir", tmp_path / "s", "--bspp", "300")
    points = torch.from_numpy(np.load(tmp_path / "s" / "samples.npz")["arr_0"])  # the same noise, the same points
    real = datasets.build("toys", None, {"name": "moons", "n": POINTS}).images
    assert float(rows[2][4]) == pytest.approx(sliced_wasserstein(points, real), abs=1e-4)
    assert "straightness deviation" in printed and rows[0][5] == rows[2][5] != rows[1][5]  # of the flow, whatever the steps
    printed = here("compare", "--weights", a, *flags[:4], "--sampling_method", "scipy_solver", "--out", out)
    assert re.search(r"moons_1 +\| scipy_solver +\| +\| +\d\d+ ", printed)


def test_times_and_names_are_those_of_other_commands(points_flow, tmp_path, here):
    """On a path with a time of its own; of a run, whose snapshots are told apart by their steps."""
    weights, out, path = points_flow("moons", 1), tmp_path / "out", "flow.path=cosine"
    run = tmp_path / "run"
    (run / "snapshots").mkdir(parents=True)
    (run / "config.yaml").touch()
    ours = shutil.copy(weights, run / "snapshots" / "step_00000010.safetensors")
    flags = ["--n_samples", "300", "--sampling_steps", "4", path]
    printed = here("compare", "--weights", ours, weights, *flags, "--frames", "2", "--out", out)
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in printed.splitlines() if line.startswith("|")][2:]
    assert [row[0] for row in rows] == ["run", "moons_1"]
    here("sample", "--weights", weights, *flags, "--save_dir", tmp_path / "s", "--bspp", "300")
    points = torch.from_numpy(np.load(tmp_path / "s" / "samples.npz")["arr_0"])
    real = datasets.build("toys", None, {"name": "moons", "n": POINTS}).images
    assert [float(row[4]) for row in rows] == pytest.approx([sliced_wasserstein(points, real)] * 2, abs=1e-4)
    later = shutil.copy(weights, run / "snapshots" / "step_00000020.safetensors")
    for both in ([ours, later], [ours, run / "snapshots/../snapshots/step_00000010.safetensors"]):
        printed = here("compare", "--weights", *both, *flags, "--frames", "2", "--out", out)
        names = {line.split("|")[1].strip() for line in printed.splitlines() if line.startswith("|")} - {"flow"}
        assert len({name for name in names if name.strip("- ")}) == 2


def test_failing_ffmpeg_costs_the_video_alone(points_flow, tmp_path, here, monkeypatch):
    """As one whose libraries are missing; it writes to a name that no colon makes a protocol of."""
    stub, out = tmp_path / "bin/ffmpeg", tmp_path / "a:b"
    stub.parent.mkdir()
    stub.write_text(f"#!/bin/sh\necho \"$@\" > '{tmp_path}/arguments'\nexit 127\n")
    stub.chmod(0o755)
    monkeypatch.setenv("PATH", str(stub.parent), prepend=os.pathsep)
    flags = ["--n_samples", "50", "--frames", "2", "--sampling_steps", "1"]
    printed = here("compare", "--weights", points_flow("moons", 1), *flags, "--out", out)
    assert "note: no compare.mp4, as ffmpeg ended with status 127" in printed
    assert {path.name for path in out.iterdir()} == {"compare.gif", "compare.png", "compare.md"}
    target = (tmp_path / "arguments").read_text().split()[-1]
    assert target.startswith(f"file:{out}/") and target.endswith("compare.mp4")


def test_hint_stays_in_the_folder_of_figures(points_flow, tmp_path, here):
    """Also for two runs of one name, which their paths tell apart."""
    paths = [tmp_path / name / "flow.safetensors" for name in "ab"]
    for path in paths:
        path.parent.mkdir()
        shutil.copy(points_flow("moons", 1), path)
    flags = ["--n_samples", "50", "--frames", "2", "--sampling_steps", "1", "--out", tmp_path / "out"]
    printed = here("compare", "--weights", *paths, *flags)
    assert f"--weights {paths[0]} --out {tmp_path / 'out/flow'}" in printed


def test_particles_go_straight_within_a_step():
    states = np.array([[[0.0, 0.0]], [[1.0, 0.0]], [[1.0, 2.0]]])
    panel = compare.Panel("", 2, 2, 0.0, 0.0, [0.0, 0.5, 1.0], states)
    assert panel.at(0.25).tolist() == [[[0, 0]], [[0.5, 0]]]
    assert panel.at(0.75).tolist() == [[[0, 0]], [[1, 0]], [[1, 1]]]
    assert panel.at(1.0).tolist() == states.tolist()


def test_mistakes(points_flow, tmp_path, error):
    a, labelled = points_flow("moons", 1), points_flow("moons", 1, "{width: 16, num_classes: 2}")
    out = ["--out", tmp_path / "out"]
    assert "--names: 1 for 2 weights; give one for each" in error("compare", "--weights", a, a, "--names", "one", *out)
    assert "is not a flow of points without labels" in error("compare", "--weights", a, labelled, *out)
    assert "unknown key 'lr'. Did you mean 'optimizer.lr'?" in error("compare", "--weights", a, *out, "lr=1e-3")
    assert not (tmp_path / "out").exists()
