"""Latent flows: codecs, the cache and what a kill costs it, training, sampling and evaluation on latents, mistakes."""

import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from conftest import REPOSITORY, contents, run_here, succeed
from PIL import Image

import datasets
import models
from datasets import DataSpec
from datasets.images import to_float
from datasets.shards import read_shard
from flow.noise import gaussian_noise, generator
from flow.sampling import Sampler, snapshot
from flow.sampling.generate import generate
from flow.sampling.images import read_png, side_by_side_grid, to_uint8
from flow.sampling.settings import SamplerSettings
from flow.training.data_loader import TrainingLoader
from models import autoencoder

pytest.importorskip("diffusers")

DIT = "model.args={width: 16, depth: 1, heads: 2, patch: 2, num_classes: 10}"
TRAIN = [
    "data.name=latents", "data.horizontal_flip=true", "model.name=dit", DIT, "train.steps=4", "train.batch_size=32",
    "train.checkpoint_every_steps=2", "train.sample_every_steps=4", "train.log_with=[]", "preview.n_samples=10",
    "preview.sampling_steps=1",
]  # fmt: skip
CACHE = ["data.name=digits", "data.args.split=test", "--shard_images", "120", "--bspp", "50"]


@pytest.fixture(scope="module")
def cache(tmp_path_factory, vae_folder) -> Path:
    out = tmp_path_factory.mktemp("cache") / "latents"
    run_here("cache_latents", "--vae", vae_folder, "--save_dir", out, *CACHE)
    return out


@pytest.fixture(scope="module")
def data(cache):
    return datasets.build("latents", None, {"path": str(cache)})


@pytest.fixture(scope="module")
def run(tmp_path_factory, cache) -> Path:
    path = tmp_path_factory.mktemp("runs") / "latent"
    run_here("train", *TRAIN, f"data.args.path={cache}", "-e", path)
    return path


def test_images_are_encoded_and_transferred(run):
    """By the autoencoder of the snapshot: the noise of an image is that of its latents."""
    sampler = Sampler.load(run)
    images = sampler.sample(2, steps=2)
    latents = sampler.model.encode(images.float() / 127.5 - 1)
    noise = sampler.encode(images, labels=[0, 1], steps=2)
    assert noise.shape == (2, *sampler.model.shape) and torch.equal(noise, sampler.encode(latents, labels=[0, 1], steps=2))
    assert sampler.transfer(noise, labels=[0, 1], steps=2).shape == images.shape
    with pytest.raises(ValueError, match=r"x1 of shape \(2, 3\): the flow works on"):
        sampler.encode(torch.zeros(2, 3), labels=[0])
    with pytest.raises(ValueError, match=r"the autoencoder takes images of 1 channel\(s\), these have 3"):
        sampler.encode(torch.zeros(2, 3, 8, 8), labels=[0])


# ---- the cache


def test_decoding_undoes_normalisation(vae_folder, data):
    plain, codec = autoencoder.load(str(vae_folder)), models.build_codec(data.codec)
    z = torch.randn(4, 2, 4, 4)
    torch.testing.assert_close(codec.decode(data.normalised(z)), plain.decode(z), atol=1e-5, rtol=1e-4)
    assert not torch.allclose(codec.decode(z), plain.decode(z), atol=1e-3)


def test_cache_holds_posteriors_of_mirror_images(vae_folder, cache, data):
    """The cache holds posteriors of images and mirror images."""
    vae, real = autoencoder.load(str(vae_folder)), datasets.build("digits", None, {"split": "test"})
    assert len(data) == len(real) == 299 and data.image_shape == (2, 4, 4)
    assert torch.equal(data.labels, real.labels) and data.class_names == real.class_names
    chosen = [0, 119, 120, 298]  # both sides of a seam
    x = to_float(real.images[chosen])
    for mirrored, shown in ((False, x), (True, x.flip(-1))):
        for found, expected in zip(data.moments(chosen, [mirrored] * 4), vae.encode(shown), strict=True):
            assert found.dtype == torch.float16
            torch.testing.assert_close(found.float(), expected, atol=2e-3, rtol=2e-3)
    assert sorted(contents(cache)) == [*(f"latents_0000{i}.safetensors" for i in range(3)), "manifest.json"]


def test_latents_are_standard_in_each_channel(data):
    """Over all images, mirror images and draws: mean 0 and variance 1, by the moments themselves."""
    index = list(range(len(data)))
    means, variances = [], []
    for mirrored in (False, True):
        mean, std = (part.double() for part in data.moments(index, [mirrored] * len(index)))
        means.append(data.normalised(mean))
        variances.append((data.normalised(std) - data.normalised(torch.zeros_like(std))).square())
    mean, variance = torch.cat(means), torch.cat(variances)
    assert mean.mean((0, 2, 3)).abs().max() < 1e-6
    torch.testing.assert_close((mean.square() + variance).mean((0, 2, 3)), torch.ones(2).double(), atol=1e-6, rtol=1e-6)


def test_interrupted_cache_ends_with_same_files(here, vae_folder, cache, tmp_path):
    """Killed while the second shard was written, the first one damaged on the disk since."""
    out = tmp_path / "cut"
    out.mkdir()
    first, second = (cache / f"latents_0000{i}.safetensors" for i in (0, 1))
    (out / first.name).write_bytes(first.read_bytes()[:-100])
    shutil.copy(cache / "latents_00002.safetensors", out)
    (out / f".tmp-1-{second.name}").write_bytes(b"half")
    printed = here("cache_latents", "--vae", vae_folder, "--save_dir", out, *CACHE)
    assert "240 of them new" in printed and contents(out) == contents(cache)
    assert "0 of them new" in here("cache_latents", "--vae", vae_folder, "--save_dir", out, *CACHE)


def test_two_processes_write_the_same_files(group, vae_folder, cache, tmp_path):
    group("cache_latents", "--vae", vae_folder, "--save_dir", tmp_path / "two", *CACHE)
    assert contents(tmp_path / "two") == contents(cache)


@pytest.mark.slow
def test_killed_cache_ends_with_same_files(vae_folder, tmp_path):
    """With shards of 40 images, so that kills come in the middle of files, between them and before the manifest."""
    ask = ["--vae", vae_folder, "data.name=digits", "--shard_images", 40, "--bspp", 20]
    command = [sys.executable, "-m", "scripts.cache_latents", *map(str, ask), "--save_dir"]
    succeed(*command[1:], tmp_path / "whole")
    seen = []
    for wait in (0.0, 0.05, 0.1, 0.2, 0.3):
        out = tmp_path / "killed"
        process = subprocess.Popen([*command, str(out)], cwd=REPOSITORY, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        before = len(list(out.glob("*.safetensors"))) if out.is_dir() else 0
        while process.poll() is None and not (out.is_dir() and len(list(out.glob("*.safetensors"))) > before):
            time.sleep(0.002)
        time.sleep(wait)
        process.kill()
        process.wait()
        seen.append(len(list(out.glob("*.safetensors"))))
    assert 0 < seen[0] < 45
    succeed(*command[1:], out)
    assert contents(out) == contents(tmp_path / "whole")


def test_reconstructions_are_checked(here, vae_folder, tmp_path):
    out = tmp_path / "checked"
    printed = here(
        "cache_latents", "--vae", vae_folder, "--save_dir", out, *CACHE, "--flipped", "no", "--check", 50,
        "--feature_extractor", "digits",
    )  # fmt: skip
    found = json.loads((out / "reconstructions.json").read_text())
    vae, real = autoencoder.load(str(vae_folder)), datasets.build("digits", None, {"split": "test"})
    x = real.images[generator("check").permutation(299)[:50]]
    made = to_uint8(vae.decode(vae.encode(to_float(x))[0]))
    expected = (10 * torch.log10(255**2 / (made.double() - x.double()).square().mean((1, 2, 3)))).mean()
    assert found["PSNR"] == pytest.approx(expected.item(), abs=0.02) and found["images"] == 50
    assert "rFD-digits" in printed and found["rFD-digits"] > 0
    picture = torch.from_numpy(read_png(out / "reconstructions.png")).permute(2, 0, 1)
    assert (picture.int() - side_by_side_grid(x[:32], made[:32]).int()).abs().max() <= 2  # the cache is float16


# ---- training on it


def steps_of(data, **options) -> list:
    defaults = {
        "seed": 3, "batch_size": 8, "gradient_accumulation_steps": 1, "rank": 0, "world_size": 1, "device": torch.device("cpu"),
        "horizontal_flip": True, "num_workers": 0,
    }  # fmt: skip
    return [batch for (batch,) in TrainingLoader(data, **{**defaults, **options}).steps(2, 4)]


def test_a_latent_is_drawn_by_seed_and_position(data):
    whole = steps_of(data)
    shares = [steps_of(data, world_size=2, rank=rank) for rank in (0, 1)]
    for step, batch in enumerate(whole):
        assert torch.equal(batch.x1, torch.cat([share[step].x1 for share in shares]))
        noise = gaussian_noise("posterior", 3, batch.sample_ids, data.image_shape)
        options = []
        for mirrored in (False, True):
            mean, std = data.moments(batch.indices, [mirrored] * 8)
            options.append(data.normalised(mean.float() + std.float() * noise))
        plain, flipped = ((batch.x1 == option).flatten(1).all(1) for option in options)
        assert (plain | flipped).all() and plain.any() and flipped.any()
        assert torch.equal(batch.y, data.labels[batch.indices])
    assert not torch.equal(whole[0].x1, steps_of(data, seed=4)[0].x1)


def test_samples_of_a_latent_flow_are_images(here, run, cache, tmp_path):
    """The codec goes with the snapshot: sample.py writes images, and they are what the decoder makes of the latents."""
    assert (run / "samples" / "step_00000004.png").is_file()
    snap = snapshot.load(run)
    assert snap.image_shape == (2, 4, 4) and snap.decoded_shape == (1, 8, 8)
    out = tmp_path / "samples"
    here("sample", "--weights", run, "--n_samples", 6, "--save_dir", out, "--sampling_steps", 2, "--npz")
    model = snap.model()
    settings = SamplerSettings(steps=2)
    (made,) = generate(Accelerator(cpu=True), model, [range(6)], settings)
    codec = models.build_codec(snap.codec)
    assert made.x.shape == (6, 2, 4, 4)
    assert torch.equal(made.images, to_uint8(codec.decode(made.x)))
    for k in range(6):
        assert torch.equal(torch.from_numpy(read_png(out / "images" / f"{k:06d}.png")).permute(2, 0, 1), made.images[k])
    assert json.loads((out / "sampling.json").read_text())["image_shape"] == [1, 8, 8]
    score = ["evaluate", "--samples", out, "--reference", "digits", "--feature_extractor", "digits"]
    assert "FD-digits" in here(*score)


def test_latent_flows_are_compared_with_the_images(here, run, tmp_path):
    printed = here(
        "evaluate", "--weights", run, "--n_samples", 20, "--sampling_steps", 1, "--feature_extractor", "digits",
        "--metrics", "fid", "--no_control", "--out", tmp_path,
    )  # fmt: skip
    (row,) = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert "FD-digits" in printed and row["reference"] == "digits"


def test_pairs_of_latents_keep_the_codec(here, run, tmp_path):
    here("make_pairs", "--weights", run, "--n_pairs", 40, "--sampling_steps", 1, "--real_fraction", 0.5, "--save_dir", tmp_path)
    pairs = datasets.build("pairs", None, {"path": str(tmp_path)})
    assert pairs.image_shape == (2, 4, 4) and pairs.codec == snapshot.load(run).codec
    assert DataSpec("pairs", None, {"path": str(tmp_path)}).behind().name == "digits"


def test_other_scripts_know_of_latents(here, error, run, tmp_path):
    here("animate", "--weights", run, "--out", tmp_path, "--n", 10, "--frames", 2, "--steps_a_frame", 1)
    with Image.open(tmp_path / "trajectory.gif") as gif:
        assert gif.size[0] % 91 == 0  # ten columns of 8 pixels and their borders
    assert "gives no likelihood of images" in error("likelihood", "--weights", run, "--n_images", 2)


# ---- mistakes


def other_autoencoder(path: Path) -> Path:
    torch.manual_seed(2)
    autoencoder.build_vae(1, [8, 8], 2, 1).save(path)
    return path


def test_another_autoencoder_than_that_of_the_training(error, here, run, vae_folder, tmp_path):
    ask = ["sample", "--weights", run, "--n_samples", 2, "--sampling_steps", 1]
    message = error(*ask, "--save_dir", tmp_path / "a", f"data.autoencoder={other_autoencoder(tmp_path / 'other')}")
    assert "data.autoencoder" in message and "is not the autoencoder of these latents" in message
    assert "there is no such folder" in error(*ask, "--save_dir", tmp_path / "b", "data.autoencoder=/nowhere")
    shutil.copytree(vae_folder, tmp_path / "moved")
    here(*ask, "--save_dir", tmp_path / "c", f"data.autoencoder={tmp_path / 'moved'}")


def test_a_cache_made_by_another_codec(error, here, cache, run, tmp_path):
    other = other_autoencoder(tmp_path / "other")
    message = error("cache_latents", "--vae", other, "--save_dir", cache, *CACHE)
    assert "holds latents of another run (autoencoder" in message
    here("cache_latents", "--vae", other, "--save_dir", tmp_path / "cache", *CACHE, "--flipped", "no")
    again = ["train", *TRAIN, f"data.args.path={tmp_path / 'cache'}", "-e", tmp_path / "run"]
    assert "data.horizontal_flip=true: these latents have no flipped copies" in error(*again)
    message = error(*again, "data.horizontal_flip=false", f"train.init_from={run}")
    assert "train.init_from" in message and "was trained on latents of the autoencoder" in message


def test_images_are_named_by_any_data_section(here, error, vae_folder, tmp_path):
    """That of an autoencoder's training too; other sections say nothing, and pairs are no images."""
    config = tmp_path / "vae.yaml"
    config.write_text("data: {name: digits, args: {split: test}}\nautoencoder: {latent_channels: 2}\n")
    ask = ["cache_latents", "--vae", vae_folder, "--save_dir", tmp_path / "out"]
    assert "latents of 299 images" in here(*ask, "-c", config)
    assert "model.args.width: of the configuration only data.* has a meaning here" in error(*ask, "model.args.width=3")
    config.write_text("data: {name: digits}\nautoencoder: {latent_chanels: 2}\n")
    assert "unknown key 'autoencoder.latent_chanels'" in error(*ask, "-c", config)


@pytest.mark.parametrize(("old", "new", "key"), [("b", "c", "class_names"), ("a/1.png", "b/1.png", "labels")])
def test_cache_of_other_labels_is_refused(here, error, vae_folder, tmp_path, old, new, key):
    """The images and their order are the same."""
    photos, out = tmp_path / "photos", tmp_path / "out"
    for k, name in enumerate("aab"):
        (photos / name).mkdir(parents=True, exist_ok=True)
        Image.frombytes("L", (8, 8), bytes(range(40 * k, 40 * k + 64))).save(photos / name / f"{k}.png")
    source = ["data.name=folder", f"data.args={{path: {photos}, channels: 1}}"]
    here("cache_latents", "--vae", vae_folder, "--save_dir", out, *source)
    before = contents(out)
    (photos / old).rename(photos / new)
    line = error("cache_latents", "--vae", vae_folder, "--save_dir", out, *source)
    assert f"holds latents of another run ({key} " in line and contents(out) == before


def test_extractor_without_a_check_is_refused(error, vae_folder, tmp_path):
    line = error("cache_latents", "--vae", vae_folder, "--save_dir", tmp_path / "out", *CACHE, "--feature_extractor", "mnist")
    assert "--feature_extractor: is for --check N" in line


@pytest.mark.parametrize(
    ("extractor", "words"), [("mnst", "mnst: unknown; choose one of"), ("mnist", "takes 28x28 images, not 8x8")]
)
def test_extractor_is_checked_before_encoding(error, vae_folder, tmp_path, extractor, words):
    check = ["--check", 50, "--feature_extractor", extractor]
    line = error("cache_latents", "--vae", vae_folder, "--save_dir", tmp_path / "out", *CACHE, *check)
    assert words in line and not (tmp_path / "out").exists()


@pytest.mark.parametrize(("damage", "words"), [
    (lambda f: (f / "config.json").unlink(), "not a whole AutoencoderKL"),
    (lambda f: (f / "diffusion_pytorch_model.safetensors").unlink(), "not a whole AutoencoderKL"),
    (lambda f: edit(f, _class_name="UNet2DModel"), "config.json is of UNet2DModel"),
    (lambda f: edit(f, block_out_channels=[8, 16]), "not a whole AutoencoderKL"),
    (lambda f: edit(f, layers_per_block=2), "its weights lack"),
    (lambda f: edit(f, in_channels=[1]), "not a whole AutoencoderKL"),
])  # fmt: skip
def test_a_folder_that_is_no_autoencoder(error, vae_folder, tmp_path, damage, words):
    copy = tmp_path / "copy"
    shutil.copytree(vae_folder, copy)
    damage(copy)
    message = error("cache_latents", "--vae", copy, "--save_dir", tmp_path / "out", *CACHE)
    assert words in message and str(copy) in message and not (tmp_path / "out").exists()


def edit(folder: Path, **changes) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))


def test_what_cannot_be_encoded(error, vae_folder, cache, tmp_path, monkeypatch):
    ask = ["cache_latents", "--vae", vae_folder, "--save_dir", tmp_path / "out"]
    assert "holds no images" in error(*ask, "data.name=toys", "data.args.name=moons")
    assert "holds no images" in error(*ask, "data.name=latents", f"data.args.path={cache}")
    readme = REPOSITORY / "docs" / "images"
    assert "takes images of 1 channel" in error(*ask, "data.name=folder", f"data.args={{path: {readme}, size: 8}}")
    assert "must be divisible by 2" in error(*ask, "data.name=folder", f"data.args={{path: {readme}, size: 7, channels: 1}}")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("x")
    message = error("cache_latents", "--vae", vae_folder, "--save_dir", tmp_path / "mine", *CACHE)
    assert "was not written by cache_latents" in message
    monkeypatch.setitem(sys.modules, "diffusers", None)
    assert "pip install -r requirements-latent.txt" in error(*ask, "data.name=digits")


def test_a_cache_that_is_not_whole(cache, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(cache, copy)
    tensors, _ = read_shard(copy / "latents_00001.safetensors")
    assert tensors["mean"].shape == (120, 2, 4, 4)
    shutil.copy(copy / "latents_00000.safetensors", copy / "latents_00001.safetensors")
    with pytest.raises(ValueError, match=r"latents_00001\.safetensors is not the shard of this manifest"):
        datasets.build("latents", None, {"path": str(copy)})
    (copy / "latents_00001.safetensors").unlink()
    with pytest.raises(ValueError, match=r"latents_00001\.safetensors is missing or damaged"):
        datasets.build("latents", None, {"path": str(copy)})
    (copy / "manifest.json").unlink()
    with pytest.raises(FileNotFoundError, match="cache_latents"):
        datasets.build("latents", None, {"path": str(copy)})
