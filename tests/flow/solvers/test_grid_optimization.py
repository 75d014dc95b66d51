"""Tuned time grids: the cheapest path through a fine trajectory, a descent that never gets worse, the command."""

import itertools
import json
import re
import shutil

import pytest
import torch

import models
from configs import loading
from flow import solvers
from flow.sampling import grid_store, locate, snapshot
from flow.solvers import grid_optimization, time_grids


def velocity(x: torch.Tensor, t: float, t_next=None) -> torch.Tensor:
    """Almost straight but for a bend around t = 0.8."""
    return torch.ones_like(x) + 30 * x.sign() * torch.exp(torch.tensor(-((t - 0.8) ** 2) / 0.002))


@pytest.fixture(scope="module")
def fine():
    return grid_optimization.reference_trajectory(velocity, torch.linspace(-2, 2, 8, dtype=torch.float64)[:, None], 12)


def test_the_shortest_grid_is_the_best_of_all(fine):
    states, velocities = fine

    def price(times: tuple[int, ...]) -> float:
        total = 0.0
        for i, j in itertools.pairwise(times):
            total += (states[i] + (j - i) / 12 * velocities[i] - states[j]).square().mean().sqrt().item()
        return total

    found = grid_optimization.dynamic_programming_grid(states, velocities, 4)
    best = min(((0, *inner, 12) for inner in itertools.combinations(range(1, 12), 3)), key=price)
    assert found == pytest.approx([i / 12 for i in best])
    with pytest.raises(ValueError, match="13 steps: must be from 1 to the 12"):
        grid_optimization.dynamic_programming_grid(states, velocities, 13)


def test_descent_ends_closer_and_in_order():
    x0 = torch.linspace(-2, 2, 8, dtype=torch.float64)[:, None]
    target = solvers.solve(velocity, x0, time_grids.uniform(2000), "heun").x

    def error(times: list[float]) -> float:
        return (solvers.solve(velocity, x0, times, "euler").x - target).square().mean().sqrt().item()

    start = time_grids.uniform(5)
    found = grid_optimization.refine_grid(error, start, 150)
    assert error(found) < 0.5 * error(start)
    assert found[0] == 0 and found[-1] == 1 and all(a < b for a, b in itertools.pairwise(found))
    assert grid_optimization.refine_grid(error, [0.0, 1.0], 10) == [0.0, 1.0]


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
    errors = 2 * (len(time_grids.GRIDS) + 1) + 1 + 3
    total = 2 * 2 * 16 + errors * (2 + 3 + 3 + 5)  # NFE of euler and heun with two and three steps
    assert {(name, int(end)) for name, _, end in bars} == {("velocity evaluations", total)}
    assert bars[-1][1] == bars[-1][2]


@pytest.mark.slow
def test_the_study(tmp_path, tiny_run, here, error):
    study = ["solver_study", "--weights", tiny_run, "--out", tmp_path, "--n_images", "2"]
    out = here(*study, "--methods", "euler", "heun", "unipc", "--grids", "uniform", "edm", "--sampling_steps", "2", "4")
    assert out.count("| euler") == 4 and (tmp_path / "study.png").stat().st_size > 0
    assert "--t_end 0.5: must be" in error(*study, "--t_end", "0.5", "--num_fid_images", "40")

    def with_distances(scale: str) -> list[list[str]]:
        asked = ["--num_fid_images", "40", "--feature_extractor", "digits", "--methods", "euler", "heun", "--nfe", "3"]
        lines = here(*study, *asked, "--guidance_scale", scale).splitlines()
        return [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines if line.startswith(("| euler", "| heun"))]

    euler, heun = first = with_distances("2")
    assert (euler[2], heun[2]) == ("3", "2")
    assert all(float(line[-1]) > 0 and line[3] == "3" for line in first)
    assert with_distances("1") != first and with_distances("2") == first  # the rows of other calls are not taken for these


def test_study_of_points_has_no_frechet_distance(error, points_flow, tmp_path):
    study = ["solver_study", "--weights", points_flow("mixture", 1), "--out", tmp_path / "out", "--num_fid_images", "40"]
    assert "--num_fid_images 40: is for images, and these weights are a flow of points" in error(*study)
    assert not (tmp_path / "out").exists()


def test_study_measures_order(tmp_path, here):
    """The study measures the order of a smooth network."""
    cfg = loading.load(None, ["model.name=dit", "model.args={width: 16, depth: 1, heads: 2, time_frequency: 5}"])
    torch.manual_seed(0)
    net = models.build("dit", (1, 8, 8), cfg.model.args)
    for p in net.parameters():
        torch.nn.init.normal_(p, std=0.2)
    snapshot.save(tmp_path / "net.safetensors", net.state_dict(), cfg, (1, 8, 8), 1, 1)
    study = ["solver_study", "--weights", tmp_path / "net.safetensors", "--out", tmp_path, "--n_images", "2"]
    study += ["--methods", "euler", "heun", "rk4", "ab3", "--sampling_steps", "16", "32", "--t_end", "0.5", "--float64"]
    lines = here(*study).splitlines()[2:10]
    found = {(cells := [c.strip() for c in line.split("|")])[1]: float(cells[-2]) for line in lines[1::2]}
    assert found == {
        "euler": pytest.approx(1, abs=0.1),
        "heun": pytest.approx(2, abs=0.1),
        "rk4": pytest.approx(4, abs=0.1),
        "ab3": pytest.approx(3, abs=0.3),
    }
