"""The DiT of configs/celebahq_dit.yaml and an autoencoder of the usual size, as large as they are: one step, one sample."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open

from models import autoencoder

pytest.importorskip("diffusers")


@pytest.mark.slow
def test_one_step_and_one_decoded_sample(here, tmp_path):
    torch.manual_seed(0)
    vae = autoencoder.build_vae(3, [128, 256, 512, 512], 4, 2)
    assert sum(p.numel() for p in vae.parameters()) == pytest.approx(83.65e6, rel=1e-3)
    vae.save(tmp_path / "vae")
    (tmp_path / "images").mkdir()
    pixels = np.random.default_rng(0).integers(0, 256, (2, 64, 64, 3), dtype=np.uint8)
    for k, image in enumerate(pixels):
        Image.fromarray(image).resize((256, 256)).save(tmp_path / "images" / f"{k}.png")
    source = ["data.name=folder", f"data.args.path={tmp_path / 'images'}"]
    here("cache_latents", "--vae", tmp_path / "vae", "--save_dir", tmp_path / "latents", *source, "-mp", "bf16")
    printed = here(
        "train", "-c", "configs/celebahq_dit.yaml", "-e", tmp_path / "run", f"data.args.path={tmp_path / 'latents'}",
        "train.steps=1", "train.batch_size=2", "preview.n_samples=1", "preview.sampling_steps=1", "train.log_with=[]",
        "-mp", "bf16",
    )  # fmt: skip
    assert "38.88 M" in printed and "latents of 4x32x32" in printed
    row = json.loads((tmp_path / "run" / "metrics.jsonl").read_text())
    assert 1 < row["loss"] < 3 and row["grad_norm"] > 0  # the network starts as zero: E|x1 - x0|^2 = 2
    with safe_open(tmp_path / "run" / "snapshots" / "step_00000001.safetensors", framework="pt") as snapshot:
        assert json.loads(snapshot.metadata()["codec"])["image_shape"] == [3, 256, 256]
    here("sample", "--weights", tmp_path / "run", "--n_samples", 1, "--save_dir", tmp_path / "out", "--sampling_steps", 1)
    with Image.open(tmp_path / "out" / "images" / "000000.png") as image:
        assert image.size == (256, 256) and image.mode == "RGB"
