"""Exported snapshots: half the size, and with everything else that a snapshot holds."""

import shlex

import torch
from conftest import TINY_TRAIN
from PIL import Image
from safetensors.torch import load_file

from flow.sampling import locate, snapshot
from flow.sampling.images import read_png


def test_half_the_size(here, error, tmp_path, tiny_run):
    """And it samples the same images, to the rounding."""
    out = tmp_path / "half.safetensors"
    printed = here("export", "--weights", tiny_run, "--out", out)
    source = locate.find(tiny_run)
    assert out.stat().st_size < 0.6 * source.stat().st_size and "sample.py" in printed.splitlines()[-1]
    before, after = load_file(source), load_file(out)
    assert all(torch.equal(after[key], before[key].half()) for key in before)
    assert "exists already" in error("export", "--weights", tiny_run, "--out", out)
    for name, weights in {"half": out, "whole": tiny_run}.items():
        here("sample", "--weights", weights, "--n_samples", 4, "--sampling_steps", 2, "--save_dir", tmp_path / name)
    for k in range(4):
        a, b = (read_png(tmp_path / name / "images" / f"{k:06d}.png").astype(int) for name in ("half", "whole"))
        assert abs(a - b).max() <= 2


def test_latent_snapshot_keeps_decoder_and_class_names(here, error, tmp_path, vae_folder):
    """An export that loses them makes no images and names no classes."""
    latents, run, out = tmp_path / "latents", tmp_path / "run", tmp_path / "half.safetensors"
    here("cache_latents", "--vae", vae_folder, "--save_dir", latents, "data.name=digits", "data.args.split=test")
    here(
        "train", "data.name=latents", f"data.args.path={latents}", "model.name=dit",
        "model.args={width: 16, depth: 1, heads: 2, patch: 2, num_classes: 10}", "train.steps=1", "train.batch_size=16",
        "train.log_with=[]", "train.sample_every_steps=0", "preview.n_samples=2", "preview.sampling_steps=1", "-e", run,
    )  # fmt: skip
    refused = error("export", "--weights", run, "--out", out, "--torch_export", tmp_path / "graph.pt2", "--sampling_steps", 1)
    assert "a flow on latents has no graph" in refused and not out.exists()  # before anything is written
    here("export", "--weights", run, "--out", out)
    before, after = snapshot.load(run), snapshot.load(out)
    assert before.codec and before.class_names
    for name in ("codec", "class_names", "image_shape", "step", "half_life_images"):
        assert getattr(after, name) == getattr(before, name), name
    assert after.config.model == before.config.model and after.config.flow == before.config.flow
    for name, weights in {"whole": run, "half": out}.items():
        flags = ["--n_samples", "4", "--sampling_steps", "1", "--save_dir", tmp_path / name, f"data.autoencoder={vae_folder}"]
        here("sample", "--weights", weights, *flags)
    assert sorted(p.name for p in (tmp_path / "half" / "images").iterdir()) == [f"{k:06d}.png" for k in range(4)]


def test_the_command_names_the_folder_of_the_source(here, tmp_path):
    """A file in no run may not choose what is read; others do not read the places of this machine."""
    photos, run, out, card = tmp_path / "photos", tmp_path / "run", tmp_path / "half.safetensors", tmp_path / "exported"
    photos.mkdir()
    for k in range(3):
        Image.new("L", (8, 8), 40 * k).save(photos / f"{k}.png")
    source = ["flow.source.name=folder", f"flow.source.args={{path: {photos}, size: 8, channels: 1}}"]
    here("train", *TINY_TRAIN, "-e", run, "train.steps=1", *source)
    command = shlex.split(here("export", "--weights", run, "--out", out).partition("sample from it with: ")[2])
    here("sample", *command[2:], "--n_samples", "2", "--save_dir", tmp_path / "samples", "--sampling_steps", "1")
    assert (tmp_path / "samples/grid.png").is_file()
    here("export", "--weights", run, "--to", card)
    readme = (card / "README.md").read_text()
    assert "flow.source.args.path=PATH" in readme and str(photos) not in readme


def test_guided_picture_needs_labels(error, points_flow, tmp_path):
    """There is no preview, as the weights lie in no run, and their header asks for a guided one."""
    snap = snapshot.load(points_flow("moons", 1))
    snap.config.preview.guidance_scale = 3.0
    snapshot.save(tmp_path / "guided.safetensors", snap.weights, snap.config, snap.image_shape, 10, 1000)
    line = error("export", "--weights", tmp_path / "guided.safetensors", "--to", tmp_path / "out")
    assert "preview: guidance_scale=3.0: needs a network with labels (model.args.num_classes)" in line
    assert not (tmp_path / "out").exists()
