"""What only a GPU can show; scripts/benchmark/gpu_check.sh runs it there, elsewhere all of it is skipped."""

from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TINY_TRAIN, succeed
from PIL import Image

from flow.sampling import snapshot

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")


@pytest.fixture(autouse=True)
def use_gpu(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "false")


@pytest.mark.parametrize("options", [
    ["-mp", "bf16"], ["-mp", "fp16"], ["-mp", "bf16", "train.compile=true"],
    ["flow.coupling=ot", "flow.coupling_args.block=16", "model.args.num_classes=10", "data.horizontal_flip=true"],
])  # fmt: skip
def test_training(tmp_path, options):
    out = succeed("train.py", *TINY_TRAIN, "-e", tmp_path / "run", *options, "train.steps=20", timeout=600).stdout
    assert "device: cuda" in out
    assert all(torch.isfinite(w).all() for w in snapshot.load(tmp_path / "run").weights.values())


@pytest.mark.parametrize("options", [["-mp", "no"], ["-mp", "bf16"], ["-mp", "bf16", "optimizer.name=muon"]])
def test_a_graph_trains_what_single_kernels_train(tmp_path, options):
    for name, graph in (("single", "false"), ("graph", "true")):
        command = [*TINY_TRAIN, "-e", tmp_path / name, *options, "train.steps=12", f"train.cuda_graph={graph}",
                   "optimizer.warmup_steps=0"]  # fmt: skip
        out = succeed("train.py", *command).stdout
        assert ("a step is one CUDA graph" in out) == (name == "graph")
    assert apart(tmp_path / "single", tmp_path / "graph") < 0.2


def test_a_graph_goes_on_where_it_stopped(tmp_path):
    graph = [*TINY_TRAIN, "train.cuda_graph=true", "optimizer.warmup_steps=0"]
    succeed("train.py", *graph, "-e", tmp_path / "whole", "train.steps=12")
    succeed("train.py", *graph, "-e", tmp_path / "parts", "train.steps=6")
    succeed("train.py", "-e", tmp_path / "parts", "-r", "latest", "train.steps=12")
    assert apart(tmp_path / "whole", tmp_path / "parts") < 0.2


def apart(run: Path, other: Path) -> float:
    """The distance of two runs over what the last two steps of the first moved, of which a step left out is about half."""
    before, end = (snapshot.load(path).weights for path in sorted((run / "snapshots").iterdir())[-2:])
    weights = snapshot.load(other).weights
    norms = [torch.cat([(end[k] - each[k]).double().flatten() for k in end]).norm() for each in (weights, before)]
    return (norms[0] / norms[1]).item()


def test_a_run_goes_on_where_it_stopped(tmp_path):
    """Convolutions on a GPU need not add in the same order, so close, not equal."""
    succeed("train.py", *TINY_TRAIN, "-e", tmp_path / "whole")
    succeed("train.py", *TINY_TRAIN, "-e", tmp_path / "parts", "train.steps=2")
    succeed("train.py", "-e", tmp_path / "parts", "-r", "latest", "train.steps=4")
    whole, parts = (snapshot.load(tmp_path / name).weights for name in ("whole", "parts"))
    for name, value in whole.items():
        torch.testing.assert_close(parts[name], value, rtol=1e-3, atol=1e-4)


def test_samples_are_those_of_the_cpu(tmp_path, tiny_run):
    """The same noise, the same steps: at most 2 levels of 255 apart."""
    command = ["sample.py", "--weights", tiny_run, "--n_samples", 16, "--sampling_steps", 10, "--save_dir"]
    succeed(*command, tmp_path / "gpu")
    succeed(*command, tmp_path / "cpu", ACCELERATE_USE_CPU="true")
    for k in range(16):
        gpu, cpu = (np.asarray(Image.open(tmp_path / d / "images" / f"{k:06d}.png")).astype(int) for d in ("gpu", "cpu"))
        assert abs(gpu - cpu).max() <= 2


def test_a_compiled_network_samples_the_same(tmp_path, tiny_run):
    command = ["sample.py", "--weights", tiny_run, "--n_samples", 8, "--sampling_steps", 5, "--save_dir"]
    succeed(*command, tmp_path / "plain")
    succeed(*command, tmp_path / "compiled", "--compile", timeout=600)
    for k in range(8):
        a, b = (np.asarray(Image.open(tmp_path / d / "images" / f"{k:06d}.png")).astype(int) for d in ("plain", "compiled"))
        assert abs(a - b).max() <= 2
