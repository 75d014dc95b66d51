"""scripts.solver_study: errors of the flow and its source, the command that it suggests, a whole study.csv."""

from pathlib import Path

import pytest
import torch

import models
from configs import loading
from flow.sampling import snapshot

POINTS = ["data.name=toys", "data.args={name: moons, n: 200}", "model.name=mlp", "model.args={width: 16}"]


@pytest.fixture
def flow(tmp_path):
    """flow(*keys, scale): the snapshot of an untrained flow of points, its weights times `scale`."""

    def make(*keys: str, scale: float = 1.0) -> Path:
        config = loading.load(None, [*POINTS, *keys])
        torch.manual_seed(0)
        weights = models.build("mlp", (2,), config.model.args).state_dict()
        path = tmp_path / "net.safetensors"
        snapshot.save(
            path, {name: value + scale * torch.randn_like(value) for name, value in weights.items()}, config, (2,), 1, 1
        )
        return path

    return make


def study(weights: Path, out: Path, *flags) -> list:
    return ["solver_study", "--weights", weights, "--out", out, "--n_images", 2, "--methods", "euler", *flags]


def test_a_steep_flow_is_one_line(error, flow, tmp_path):
    """The adaptive method of the fine solution finds no step."""
    line = error(*study(flow(scale=1e20), tmp_path / "out", "--sampling_steps", 2))
    assert "the fine solution: dopri5: the velocity is not finite, or too steep" in line


@pytest.mark.parametrize("script", ["solver_study", "optimize_grid"])
def test_a_source_that_does_not_fit_is_one_line(error, flow, tmp_path, script):
    weights = flow("flow.source.name=digits")
    command = study(weights, tmp_path / "out") if script == "solver_study" else [script, "--weights", weights]
    assert "flow.source: digits: has samples of (1, 8, 8), the flow works on (2,)" in error(*command)


def test_suggested_grid_is_fitted_as_it_is_used(error, tiny_run, tmp_path):
    """With the guidance scale and the keys of the study."""
    flags = ["--grids", "optimized", "--sampling_steps", 4, "--guidance_scale", 2, "data.root=elsewhere"]
    line = error(*study(tiny_run, tmp_path / "out", *flags))
    assert line.endswith("--methods euler --steps 4 --guidance_scale 2 data.root=elsewhere")


def test_a_study_takes_the_place_of_the_one_before(here, flow, tmp_path):
    """Who reads its study.csv meanwhile reads that to the end."""
    weights, out = flow(scale=0.2), tmp_path / "out"
    here(*study(weights, out, "--sampling_steps", 2, 4))
    before = (out / "study.csv").read_text()
    with open(out / "study.csv") as reader:
        here(*study(weights, out, "--sampling_steps", 2))
        assert reader.read() == before != (out / "study.csv").read_text()


@pytest.mark.slow
def test_the_study(tmp_path, tiny_run, here, error):
    study = ["solver_study", "--weights", tiny_run, "--out", tmp_path, "--n_images", "2"]
    out = here(*study, "--methods", "euler", "heun", "unipc", "--grids", "uniform", "edm", "--sampling_steps", "2", "4")
    assert out.count("| euler") == 4 and (tmp_path / "study.png").stat().st_size > 0
    assert "--t_end 0.5: must be" in error(*study, "--t_end", "0.5", "--num_fid_images", "40")

    def with_distances(scale: str) -> list[list[str]]:
        flags = ["--num_fid_images", "40", "--feature_extractor", "digits", "--methods", "euler", "heun", "--nfe", "3"]
        lines = here(*study, *flags, "--guidance_scale", scale).splitlines()
        return [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines if line.startswith(("| euler", "| heun"))]

    euler, heun = first = with_distances("2")
    assert (euler[2], heun[2]) == ("3", "2")
    assert all(float(line[-1]) > 0 and line[3] == "3" for line in first)
    assert with_distances("1") != first and with_distances("2") == first  # the rows of other calls are not taken for these


def test_study_of_points_has_no_frechet_distance(error, points_flow, tmp_path):
    study = ["solver_study", "--weights", points_flow("mixture", 1), "--out", tmp_path / "out", "--num_fid_images", "40"]
    assert "--num_fid_images 40: is for images, and these weights are a flow of points" in error(*study)
    assert "--prompts: does not go with --num_fid_images" in error(*study, "--prompts", "a three")
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
    orders = {(cells := [c.strip() for c in line.split("|")])[1]: float(cells[-2]) for line in lines[1::2]}
    assert orders == {
        "euler": pytest.approx(1, abs=0.1),
        "heun": pytest.approx(2, abs=0.1),
        "rk4": pytest.approx(4, abs=0.1),
        "ab3": pytest.approx(3, abs=0.3),
    }
