"""Mixed precision: auto is bf16 where the machine has instructions for it, and each command computes in what it is given."""

import json

import pytest
import torch
from conftest import TINY_TRAIN
from safetensors.torch import load_file

from flow.evaluation import results
from flow.runtime.distributed import build_accelerator, resolve_precision
from flow.sampling import locate
from flow.sampling.output import read_pngs


@pytest.mark.skipif(not hasattr(torch.cpu, "get_capabilities"), reason="torch before 2.11")
@pytest.mark.parametrize("flag", ["avx512_bf16", "amx_bf16", "bf16", None])
def test_auto_is_what_the_cpu_has(monkeypatch, flag):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx2": True, "bf16": False} | ({flag: True} if flag else {}))
    expected = "bf16" if flag else "no"
    assert resolve_precision("auto") == expected
    assert build_accelerator("auto").mixed_precision == expected


def test_others_stay():
    assert [resolve_precision(name) for name in ("no", "fp16", "bf16")] == ["no", "fp16", "bf16"]


def test_training_in_bf16(here, tmp_path, tiny_run):
    """Other weights than in float32, but hardly."""
    assert "precision bf16" in here("train", *TINY_TRAIN, "-mp", "bf16", "-e", tmp_path / "run")
    weights, expected = (load_file(locate.find(run)) for run in (tmp_path / "run", tiny_run))
    distance = max((weights[name] - expected[name]).abs().max() for name in expected)
    assert 1e-6 < distance < 5e-3


def test_samples_in_bf16(here, tmp_path, tiny_run):
    """Other images than in float32, by a few levels."""
    for precision in ("no", "bf16"):
        given = ["--weights", tiny_run, "--n_samples", 20, "--sampling_steps", 2, "--guidance_scale", 3]
        here("sample", *given, "-mp", precision, "--save_dir", tmp_path / precision)
        assert json.loads((tmp_path / precision / "sampling.json").read_text())["mixed_precision"] == precision
    whole, half = (read_pngs(tmp_path / name / "images", range(20)).astype(int) for name in ("no", "bf16"))
    assert 1 <= abs(whole - half).max() <= 8


def test_rows_in_bf16(here, tmp_path, tiny_run):
    given = ["--weights", tiny_run, "--n_samples", 80, "--sampling_steps", 1, "--feature_extractor", "digits", "--no_control"]
    for precision in ("no", "bf16"):
        here("evaluate", *given, "--metrics", "fid", "-mp", precision, "--out", tmp_path)
    whole, half = results.read(tmp_path)
    assert [row["identity"]["mixed_precision"] for row in (whole, half)] == ["no", "bf16"]
    assert 0 < abs(whole["metrics"]["FD-digits"] / half["metrics"]["FD-digits"] - 1) < 0.02
