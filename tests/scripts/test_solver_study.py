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
