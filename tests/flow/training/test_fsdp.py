"""Training in shards (FSDP2) on two CPU processes: the same network as without, checkpoints, snapshots, previews."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from conftest import REPOSITORY, run_script, succeed
from safetensors.torch import load_file

from flow.runtime import distributed, sharding
from flow.training.ema import Ema

DIT = "model.args={width: 16, depth: 2, heads: 2, patch: 2, num_classes: 10}"
TRAIN = [
    "data.name=digits", "model.name=dit", DIT, "train.steps=4", "train.batch_size=32", "train.gradient_accumulation_steps=2",
    "train.checkpoint_every_steps=2", "train.sample_every_steps=4", "train.log_with=[]", "ema.half_life_images=[200, 50]",
    "preview.n_samples=20", "preview.sampling_steps=1", "ema.power_widths=[0.1]", "ema.power_every_steps=2",
]  # fmt: skip


def fsdp_environment() -> dict[str, str]:
    """What accelerate-launch makes of configs/accelerate/fsdp.yaml."""
    text = (REPOSITORY / "configs" / "accelerate" / "fsdp.yaml").read_text()
    config = yaml.safe_load(text)["fsdp_config"]
    names = {"fsdp_transformer_layer_cls_to_wrap": "FSDP_TRANSFORMER_CLS_TO_WRAP"}
    settings = {names.get(key, key.upper()): str(value) for key, value in config.items()}
    return {"ACCELERATE_USE_FSDP": "true", **settings}


def snapshots(run: Path) -> dict[str, dict[str, torch.Tensor]]:
    folders = (run / "snapshots", *sorted((run / "power_averages").glob("*")))
    return {f"{folder.name}/{p.name}": load_file(p) for folder in folders for p in sorted(folder.iterdir())}


def test_the_first_version_of_fsdp_is_refused(error, monkeypatch, tmp_path):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("FSDP_VERSION", "1")
    assert "fsdp_version=1: must be 2" in error("train", *TRAIN, "-e", tmp_path / "run")


def test_sharded_checkpoints_are_refused(error, monkeypatch, tmp_path):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("FSDP_VERSION", "2")
    assert "fsdp_state_dict_type=SHARDED_STATE_DICT (accelerate's default): must be FULL_STATE_DICT" in error(
        "train", *TRAIN, "-e", tmp_path / "run"
    )


def test_unsharded_tensors_are_their_own_parts():
    net = torch.nn.Linear(2, 2)
    assert sharding.local_shard(net.weight) is net.weight and sharding.full_tensor(net.weight) is net.weight
    ema = Ema(net, [100], 0)
    with ema.average_parameters() as averaged:
        assert averaged is net


@pytest.mark.parametrize("is_fsdp2", [False, True])
def test_weights_to_be_sharded_are_contiguous(is_fsdp2):
    """FSDP2 refuses others; without it a CPU takes convolutions in float32 with their channels side by side."""
    net = torch.nn.Conv2d(3, 8, 3)
    accelerator = SimpleNamespace(device=torch.device("cpu"), mixed_precision="no", is_fsdp2=is_fsdp2)
    distributed.prepare_model(net, accelerator)
    assert net.weight.is_contiguous() == is_fsdp2


@pytest.mark.slow
def test_training_in_shards_is_training(tmp_path):
    environment = fsdp_environment()
    sharded, whole, cut = (tmp_path / name for name in ("sharded", "whole", "cut"))
    succeed("train.py", *TRAIN, "-e", sharded, processes=2, **environment)
    succeed("train.py", *TRAIN, "-e", whole, processes=2)
    succeed("train.py", *TRAIN, "-e", cut, "train.steps=2", processes=2, **environment)
    succeed("train.py", "-e", cut, "-r", "latest", "train.steps=4", processes=2, **environment)

    found, expected, resumed = (snapshots(run) for run in (sharded, whole, cut))
    assert list(found) == list(expected) and len(found) == 6
    for name, weights in expected.items():
        assert found[name].keys() == weights.keys()
        for key, value in weights.items():
            torch.testing.assert_close(found[name][key], value, atol=2e-5, rtol=1e-3)
            if "00000004" in name:
                assert torch.equal(resumed[name][key], found[name][key])
    assert (sharded / "samples" / "step_00000004.png").is_file()
    norms = [[json.loads(line)["grad_norm"] for line in (run / "metrics.jsonl").open()] for run in (sharded, whole)]
    assert norms[0] == pytest.approx(norms[1], rel=1e-3)
    succeed("sample.py", "--weights", sharded, "--n_samples", "4", "--save_dir", tmp_path / "s", "--sampling_steps", "2")


@pytest.mark.slow
def test_times_stay_float32_in_shards(tmp_path):
    """The network gets x and t as without shards and computes in bf16: nearer to bf16 without shards than to float32."""
    sharded, whole, exact = (tmp_path / name for name in ("sharded", "whole", "exact"))
    train = [*TRAIN, "train.log_every_steps=1"]
    succeed("train.py", *train, "-e", sharded, "-mp", "bf16", processes=2, **fsdp_environment())
    succeed("train.py", *train, "-e", whole, "-mp", "bf16", processes=2)
    succeed("train.py", *train, "-e", exact, "-mp", "no", processes=2)
    rows = [[json.loads(line) for line in (run / "metrics.jsonl").open()] for run in (sharded, whole, exact)]
    for name in ("loss", "grad_norm"):
        assert [row[name] for row in rows[0]] == pytest.approx([row[name] for row in rows[1]], rel=2e-3)
    rounded = [abs(other["grad_norm"] - rows[1][1]["grad_norm"]) for other in (rows[0][1], rows[2][1])]
    assert rounded[0] < rounded[1] / 5
    for name, weights in snapshots(whole).items():
        for key, value in weights.items():
            torch.testing.assert_close(snapshots(sharded)[name][key], value, atol=1e-4, rtol=1e-3)


@pytest.mark.slow
def test_convolutions_in_shards(here, tmp_path):
    """The same weights as without shards on one process, whose convolutions have their channels side by side."""
    unet = [word for word in TRAIN if word not in ("model.name=dit", DIT)]
    unet += ["model.name=mini_unet", "model.args={width: 16, head_channels: 16, num_classes: 10}"]
    sharded, whole = tmp_path / "sharded", tmp_path / "whole"
    environment = {**fsdp_environment(), "FSDP_TRANSFORMER_CLS_TO_WRAP": "Block"}
    succeed("train.py", *unet, "-e", sharded, processes=2, **environment)
    here("train", *unet, "-e", whole)
    found, expected = snapshots(sharded), snapshots(whole)
    assert list(found) == list(expected) and len(found) == 6
    for name, weights in expected.items():
        for key, value in weights.items():
            torch.testing.assert_close(found[name][key], value, atol=5e-5, rtol=1e-3)


@pytest.mark.slow
def test_flow_maps_in_shards(tmp_path):
    """alpha_flow takes its targets from the sharded network; mean_flow, whose derivative is not to be had there, says so."""
    flow_map = [
        DIT.replace("num_classes", "two_times: true, time_frequency: 30, num_classes"),
        "train.checkpoint_every_steps=4",
    ]
    alpha_flow = [*TRAIN, *flow_map, "loss.name=alpha_flow", "loss.args={anneal_end: 0.1, guidance_scale: 2}"]
    sharded, whole = tmp_path / "sharded", tmp_path / "whole"
    succeed("train.py", *alpha_flow, "-e", sharded, processes=2, **fsdp_environment())
    succeed("train.py", *alpha_flow, "-e", whole, processes=2)
    found, expected = snapshots(sharded), snapshots(whole)
    for name, weights in expected.items():
        for key, value in weights.items():
            torch.testing.assert_close(found[name][key], value, atol=2e-5, rtol=1e-3)
    arguments = [*TRAIN, *flow_map, "loss.name=mean_flow", "-e", tmp_path / "mean_flow"]
    result = run_script("train.py", *arguments, processes=2, **fsdp_environment())
    assert (
        "loss.name=mean_flow: a derivative needs float32, in which FSDP2 has no sharded network; use loss.name=alpha_flow"
        in result.stderr
    )
