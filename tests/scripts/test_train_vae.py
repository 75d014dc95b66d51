"""Training of autoencoders: going on after a kill, fine-tuning, what is written."""

import shutil
import sys
import types

import pytest
import torch
from safetensors.torch import load_file

from configs import loading
from configs.vae import VaeConfig
from flow.training.logging import read_metrics
from models import autoencoder

pytest.importorskip("diffusers")

TINY = [
    "data.name=digits", "autoencoder.channels=[8, 8]", "autoencoder.latent_channels=2", "autoencoder.blocks=1",
    "train.steps=4", "train.batch_size=16", "train.log_every_steps=1", "train.checkpoint_every_steps=2",
    "train.sample_every_steps=0", "train.log_with=[]", "optimizer.lr=1e-2", "preview_images=4",
]  # fmt: skip


def test_a_resumed_run_is_the_uninterrupted_one(here, error, tmp_path):
    """To the bit; and what it writes is an AutoencoderKL of the averaged weights."""
    printed = here("train_vae", *TINY, "-e", tmp_path / "whole")
    assert "PSNR" in printed and (tmp_path / "whole" / "samples" / "step_00000004.png").is_file()
    here("train_vae", *TINY, "-e", tmp_path / "cut", "train.steps=2")
    here("train_vae", "-e", tmp_path / "cut", "-r", "latest", "train.steps=4")
    whole, cut = (
        load_file(tmp_path / name / "autoencoder" / "diffusion_pytorch_model.safetensors") for name in ("whole", "cut")
    )
    assert whole.keys() == cut.keys() and all(torch.equal(whole[key], cut[key]) for key in whole)
    average = load_file(tmp_path / "whole" / "checkpoints" / "step_00000004" / "ema.safetensors")
    assert all(torch.equal(average[f"net.{key}"], value) for key, value in whole.items())
    shutil.rmtree(tmp_path / "cut" / "autoencoder")  # a kill came after the last checkpoint
    here("train_vae", "-e", tmp_path / "cut", "-r", "latest")
    again = load_file(tmp_path / "cut" / "autoencoder" / "diffusion_pytorch_model.safetensors")
    assert all(torch.equal(again[key], whole[key]) for key in whole)
    rows = read_metrics(tmp_path / "whole" / "metrics.jsonl")
    assert rows[-1]["l1"] < rows[0]["l1"] and rows[-1]["kl"] > 0
    assert autoencoder.load(str(tmp_path / "whole" / "autoencoder")).latent_shape((1, 8, 8)) == (2, 4, 4)

    stored = loading.parse((tmp_path / "cut" / "config.yaml").read_text(), kind=VaeConfig)
    edited = loading.load(None, ["seed=7"], base=stored, kind=VaeConfig)
    (tmp_path / "cut" / "config.yaml").write_text(loading.dump(edited))
    line = error("train_vae", "-e", tmp_path / "cut", "-r", "latest", "train.steps=6")
    assert f"seed=7: the checkpoint {tmp_path / 'cut' / 'checkpoints' / 'step_00000004'} was made with 0" in line

    tuned = ["-e", tmp_path / "tuned", f"train.init_from={tmp_path / 'whole' / 'autoencoder'}", "train.steps=1"]
    here("train_vae", *TINY, *tuned, "optimizer.lr=1e-12")
    after = load_file(tmp_path / "tuned" / "autoencoder" / "diffusion_pytorch_model.safetensors")
    assert all(torch.allclose(after[key], whole[key], atol=1e-6) for key in whole)


def test_lpips_where_it_is_installed(here, error, tmp_path, monkeypatch):
    class Distance(torch.nn.Module):
        def __init__(self, net: str, verbose: bool):
            super().__init__()

        def forward(self, x, made):
            assert x.shape[1] == made.shape[1] == 3
            return (x - made).square().mean((1, 2, 3), keepdim=True)

    monkeypatch.setitem(sys.modules, "lpips", types.SimpleNamespace(LPIPS=Distance))
    here("export_images", "--save_dir", tmp_path / "large", "--size", 16, "--n_images", 20, "data.name=digits")
    large = [
        *TINY,
        "data.name=folder",
        f"data.args={{path: {tmp_path / 'large'}, channels: 1}}",
        "autoencoder.lpips_weight=0.5",
    ]
    here("train_vae", *large, "-e", tmp_path / "a", "train.steps=1")
    (row,) = read_metrics(tmp_path / "a" / "metrics.jsonl")
    assert row["loss"] == pytest.approx(row["l1"] + 1e-6 * row["kl"] + 0.5 * row["lpips"], rel=1e-5) and row["lpips"] > 0
    monkeypatch.setitem(sys.modules, "lpips", None)
    assert "pip install lpips" in error("train_vae", *large, "-e", tmp_path / "b")
    line = error("train_vae", *TINY, "-e", tmp_path / "b", "autoencoder.lpips_weight=0.5")
    assert "LPIPS takes images of at least 16 pixels a side, these have 8" in line


@pytest.mark.parametrize(("override", "words"), [
    ("autoencoder.channels=[8, 7]", "must be whole numbers divisible by 4"),
    ("autoencoder.channels=[8, 8, 8, 8, 8]", "sides must be divisible by 16"),
    ("autoencoder.blocks=0", "blocks=0"),
    ("autoencoder.distance=l3", "autoencoder.distance=l3: must be one of l1, mse"),
    ("autoencoder.kl_wight=1", "Did you mean 'autoencoder.kl_weight'"),
    ("train.init_from=/nowhere", "/nowhere: there is no such folder"),
])  # fmt: skip
def test_mistakes(error, tmp_path, override, words):
    assert words in error("train_vae", *TINY, "-e", tmp_path / "run", override)
    assert not (tmp_path / "run").exists()
