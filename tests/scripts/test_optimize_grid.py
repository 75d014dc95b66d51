"""scripts.optimize_grid: what it stores and sample.py uses; a stored grid is replaced only by a better one."""

import json
import re
import shutil
from contextlib import contextmanager

import pytest
import torch

from flow import solvers
from flow.runtime import lock
from flow.sampling import grid_store, locate, snapshot
from flow.sampling.settings import SamplerSettings, build_time_grid
from flow.solvers import time_grids

FEW = ["--n_images", 4, "--reference_steps", 16, "--evaluations", 5]


@pytest.fixture
def weights(tmp_path, tiny_run):
    path = tmp_path / "net.safetensors"
    path.write_bytes(locate.find(tiny_run).read_bytes())
    return path


def test_times_of_no_finite_image_are_not_stored(here, weights, monkeypatch):
    """They are neither better nor worse than others, and replace no grid."""
    snap = snapshot.load(weights)
    formulas = [build_time_grid(SamplerSettings(steps=3, time_grid=name), snap.model().path) for name in time_grids.GRIDS]
    solve = solvers.solve

    def solved(velocity, x, times, method, *args, **options):
        solution = solve(velocity, x, times, method, *args, **options)
        if len(times) == 4 and list(times) not in formulas:
            solution.x = torch.full_like(solution.x, torch.nan)
        return solution

    grid_store.store(snap, "euler", [0.0, 0.3, 0.6, 1.0])
    monkeypatch.setattr(solvers, "solve", solved)
    printed = here("optimize_grid", "--weights", weights, "--methods", "euler", "--steps", 3, *FEW)
    assert "0 optimized grid(s)" in printed and "not saved" in printed
    assert grid_store.read(snap) == {"euler": {"3": [0.0, 0.3, 0.6, 1.0]}}


def test_stored_grids_are_read_under_the_lock(here, weights, monkeypatch):
    """Another process may store better ones while this one waits."""
    tune, file = (
        ["optimize_grid", "--weights", weights, "--methods", "euler", "--steps", 2, 3, *FEW],
        grid_store.file_of(weights),
    )
    saved = int(re.search(r"(\d) optimized grid\(s\) in", here(*tune)).group(1))
    others, folder = file.read_text(), lock.folder
    file.unlink()

    @contextmanager
    def taken_late(*args):
        with folder(*args):
            file.write_text(others)
            yield

    monkeypatch.setattr(lock, "folder", taken_late)
    assert saved and here(*tune).count("the stored one is no worse") == saved


def test_commands(tmp_path, tiny_run, here, error):
    """optimize_grid stores beside the snapshot, sample.py uses it; grids of other weights and half files are refused."""
    run = shutil.copytree(tiny_run, tmp_path / "run")
    weights = locate.find(run)
    tune = ["optimize_grid", "--weights", run, "--methods", "euler", "ab2", "--steps", "3"]
    tune += ["--n_images", "4", "--reference_steps", "16", "--evaluations", "5"]
    printed = here(*tune)
    saved = int(re.search(rf"(\d) optimized grid\(s\) in {grid_store.file_of(weights)}", printed).group(1))
    assert f"sample.py --weights {weights} " in printed.splitlines()[-1]  # the grids are of this file: the run may go on
    assert saved and here(*tune).count("the stored one is no worse") == saved
    grid_store.store(snapshot.load(weights), "heun", [0.0, 0.3, 1.0])
    out = tmp_path / "samples"
    sample = ["sample", "--weights", weights, "--n_samples", "4", "--save_dir", out, "--time_grid", "optimized"]
    here(*sample, "--sampling_method", "heun", "--sampling_steps", "2")
    assert json.loads((out / "sampling.json").read_text())["times"] == [0.0, 0.3, 1.0]
    line = error(*sample, "--sampling_method", "midpoint", "--sampling_steps", "2")
    for method, steps in (("dopri5", "4"), ("euler", "1")):
        assert f"not for {method} with {steps}" in error(*sample, "--sampling_method", method, "--sampling_steps", steps)
    assert "none is stored for midpoint with 2 steps" in line and "scripts.optimize_grid" in line
    stored = json.loads(grid_store.file_of(weights).read_text())
    grid_store.file_of(weights).write_text(json.dumps(stored | {"weights_sha256": "0" * 64}))
    assert "was fitted to other weights" in error(*sample, "--sampling_method", "heun", "--sampling_steps", "2")
    grid_store.file_of(weights).write_text(json.dumps(stored | {"grids": {"heun": {"2": [0.0, 1.0]}}}))
    assert "is not a whole file of grids" in error(*sample, "--sampling_method", "heun", "--sampling_steps", "2")
    grid_store.file_of(weights).write_text("{half")
    assert "is not a whole file of grids" in error(*sample, "--sampling_method", "heun", "--sampling_steps", "2")


def test_one_bar_counts_all_evaluations(tmp_path, tiny_run, main_of, capsys):
    """From the first fine trajectory on, and it ends full although a descent may end early."""
    weights = tmp_path / "net.safetensors"
    weights.write_bytes(locate.find(tiny_run).read_bytes())
    tune = ["optimize_grid", "--weights", weights, "--methods", "euler", "heun", "--steps", "2", "3"]
    main_of(*tune, "--n_images", "2", "--reference_steps", "16", "--evaluations", "3")()
    bars = re.findall(r"([^\r\n]+): +\d+%\|[^|]*\| (\d+)/(\d+)", capsys.readouterr().err)
    errors = 2 * (len(time_grids.GRIDS) + 1) + 3
    total = 2 * 2 * 16 + errors * (2 + 3 + 3 + 5)  # NFE of euler and heun with two and three steps
    assert {(name, int(end)) for name, _, end in bars} == {("velocity evaluations", total)}
    assert bars[-1][1] == bars[-1][2]
