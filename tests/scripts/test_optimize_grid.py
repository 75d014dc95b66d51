"""scripts.optimize_grid: a stored grid is replaced only by one that was measured and is better."""

import re
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
