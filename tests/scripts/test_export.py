"""Exported snapshots: half the size, and with everything else that a snapshot holds."""

import torch
from safetensors.torch import load_file

from flow.sampling import snapshot


def test_half_the_size(here, error, tmp_path, tiny_run):
    out = tmp_path / "half.safetensors"
    printed = here("export", "--weights", tiny_run, "--out", out)
    source = snapshot.find(tiny_run)
    assert out.stat().st_size < 0.6 * source.stat().st_size and "sample.py" in printed.splitlines()[-1]
    before, after = load_file(source), load_file(out)
    assert all(torch.equal(after[key], before[key].half()) for key in before)
    assert "exists already" in error("export", "--weights", tiny_run, "--out", out)


def test_latent_snapshot_keeps_decoder_and_class_names(here, tmp_path, vae_folder):
    """An export that loses them makes no images and names no classes."""
    latents, run, out = tmp_path / "latents", tmp_path / "run", tmp_path / "half.safetensors"
    here("cache_latents", "--vae", vae_folder, "--save_dir", latents, "data.name=digits", "data.args.split=test")
    here(
        "train", "data.name=latents", f"data.args.path={latents}", "model.name=dit",
        "model.args={width: 16, depth: 1, heads: 2, patch: 2, num_classes: 10}", "train.steps=1", "train.batch_size=16",
        "train.log_with=[]", "train.sample_every_steps=0", "preview.n_samples=2", "preview.sampling_steps=1", "-e", run,
    )  # fmt: skip
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
