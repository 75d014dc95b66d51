"""Stored time grids: the guidance scale that they were fitted with, and the command that makes one that is missing."""

import json
import re
from pathlib import Path

import pytest
import torch

from configs import loading
from configs.errors import UserError
from flow.sampling import grid_store, locate, snapshot


@pytest.fixture
def weights(tmp_path, tiny_run) -> Path:
    path = tmp_path / "net.safetensors"
    path.write_bytes(locate.find(tiny_run).read_bytes())
    return path


def test_another_guidance_scale_is_noted(weights, here, tmp_path):
    """By sample.py and evaluate.py; a file of an earlier version, which does not say, is used without a note."""
    grid_store.store(snapshot.load(weights), "heun", [0.0, 0.3, 1.0], guidance_scale=1.5)
    use = ["--weights", weights, "--time_grid", "optimized", "--sampling_steps", 2]
    note = "note: --time_grid optimized: the grid of heun with 2 steps was fitted at w = 1.5, not at w = 2\n"

    def sample(scale: float, folder: str) -> str:
        flags = ["--sampling_method", "heun", "--n_samples", 1, "--guidance_scale", scale, "--save_dir", tmp_path / folder]
        return here("sample", *use, *flags)

    assert sample(2, "a").count(note) == 1
    assert "was fitted" not in sample(1.5, "b")
    interval = ["--sampling_method", "heun", "--n_samples", 1, "--guidance_scale", 1.5, "--guidance_interval", 0.2, 0.8]
    assert "was fitted with classifier-free guidance at all times" in here(
        "sample", *use, *interval, "--save_dir", tmp_path / "i"
    )
    table = ["--methods", "heun", "--n_samples", 8, "--guidance_scale", 1.5, 2, "--out", tmp_path / "table", "--no_control"]
    measured = ["--feature_extractor", "digits", "--metrics", "fid", f"data.root={tmp_path}"]
    assert here("evaluate", *use, *table, *measured).count(note) == 1
    path = grid_store.file_of(weights)
    stored = json.loads(path.read_text())
    assert stored.pop("guidance_scales") == {"heun": {"2": 1.5}}
    path.write_text(json.dumps(stored))
    assert grid_store.load(snapshot.load(weights), "heun", 2) == (0.0, 0.3, 1.0)
    assert "was fitted at" not in sample(2, "c")


def test_other_grids_do_not_need_the_file(weights, here, tmp_path):
    """It may be of the weights that the file had before."""
    grid_store.file_of(weights).write_text("{}")
    here("sample", "--weights", weights, "--n_samples", 1, "--sampling_steps", 1, "--save_dir", tmp_path / "out")


def test_replacing_another_scale_is_noted(weights, here):
    """Times that no flow is solved well with, stored as those of another scale."""
    methods = ["euler", "ab2"]
    for method in methods:
        grid_store.store(snapshot.load(weights), method, [0.0, 0.001, 0.002, 1.0], guidance_scale=1.5)
    tune = ["optimize_grid", "--weights", weights, "--methods", *methods, "--steps", 3]
    printed = here(*tune, "--n_images", 4, "--reference_steps", 16, "--evaluations", 5)
    saved = int(re.search(r"(\d) optimized grid\(s\) in", printed).group(1))
    assert saved and printed.count("note: replaces the stored one, which was fitted at w = 1.5") == saved
    scales = [grid_store.fitted_scale(snapshot.load(weights), method, 3) for method in methods]
    assert scales.count(1.0) == saved and set(scales) <= {1.0, 1.5}


def test_suggested_command_has_what_was_typed(weights, error, tmp_path):
    use = ["--weights", weights, "--time_grid", "optimized", "--sampling_steps", 4, "--guidance_scale", 2]
    for script, flags in {"sample": ["--n_samples", 1, "--save_dir", tmp_path / "out"], "evaluate": ["--n_samples", 8]}.items():
        line = error(script, *use, *flags, "data.root=elsewhere")
        assert line.endswith("--methods euler --steps 4 --guidance_scale 2 data.root=elsewhere")


def test_suggested_command_has_prompts(tmp_path):
    """Those of the caller, else one of the first class."""
    args = "model.args={width: 8, head_channels: 8, max_prompt_bytes: 48}"
    config, path = loading.load(None, ["model.name=mini_unet", args]), tmp_path / "net.safetensors"
    snapshot.save(path, {"weight": torch.zeros(1)}, config, (1, 8, 8), 1, 1, class_names=["3 - three", "4 - four"])
    for flags, prompts in (([], "'a handwritten three'"), (["--prompts", "my own", "--guidance_scale", "2"], "'my own'")):
        with pytest.raises(UserError) as refusal:
            grid_store.load(snapshot.load(path), "euler", 4, flags)
        assert re.findall(r"--prompts ('[^']*')", str(refusal.value)) == [prompts]
