"""Rows of snapshots: how many images a flow that starts at data can be measured with."""

import pytest
import torch
from conftest import TINY_RUN

import models
from configs import loading
from flow.evaluation import results
from flow.sampling import snapshot

KEYS = [
    "data.name=toys", "data.args={name: moons, n: 200}", "model.name=mlp", "model.args={width: 16}", "flow.source.name=toys",
    "flow.source.args={name: eight_gaussians, n: 30}",
]  # fmt: skip


@pytest.fixture
def weights(tmp_path):
    """An untrained flow from 30 points to others."""
    config = loading.load(None, KEYS)
    torch.manual_seed(0)
    net = models.build("mlp", (2,), config.model.args)
    snapshot.save(tmp_path / "net.safetensors", net.state_dict(), config, (2,), 1, 1)
    return tmp_path / "net.safetensors"


def test_no_start_is_measured_twice(here, error, weights, tmp_path):
    """Images of one start are not independent: by evaluate.py over all repeats, and in training."""
    out = tmp_path / "out"
    command = ["evaluate", "--weights", weights, "--sampling_steps", 1, "--no_control", "--out", out, "--repeats", 2]
    line = error(*command, "--n_samples", 16)
    assert "--n_samples 16: the flow starts at 30 samples of toys; with --repeats 2 at most 15" in line and not out.exists()
    here(*command)  # takes them all
    assert [(row["first"], row["n"]) for row in results.read(out)] == [(0, 15), (15, 15)]
    train = ["train", "-e", tmp_path / "run", *KEYS, *TINY_RUN, "evaluate.every_steps=2", "evaluate.n_samples=31"]
    assert "evaluate.n_samples=31: the flow starts at 30 samples of toys; at most 30" in error(*train)
