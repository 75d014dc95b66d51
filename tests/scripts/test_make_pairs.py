"""Pairs (noise, image): what a shard holds, what a kill costs, damage that is named, training on them."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import POINTS, REPOSITORY, TINY_TRAIN, contents, run_here, succeed, wait_until
from PIL import Image
from safetensors.torch import load_file

import datasets
import models
from configs import loading
from datasets.images import Images, to_float
from datasets.pairs import Pairs
from flow.couplings import PairedCoupling
from flow.noise import gaussian_noise
from flow.sampling import Sampler, locate, snapshot
from flow.sampling.generate import index_batches, sample_batch
from flow.sampling.settings import SamplerSettings
from flow.source import GaussianSource
from scripts import make_pairs

ARGUMENTS = [
    "--n_pairs", "50", "--shard_pairs", "15", "--bspp", "5", "--sampling_steps", "3", "--guidance_scale", "2", "--seed", "4",
    "--real_fraction", "0.2",
]  # fmt: skip
NAMES = ["generated_00000", "generated_00001", "generated_00002", "inverted_00000"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tiny_run) -> Path:
    out = tmp_path_factory.mktemp("pairs") / "one"
    printed = run_here("make_pairs", "--weights", tiny_run, "--save_dir", out, *ARGUMENTS)
    assert "50 pairs" in printed and "50 of them new" in printed
    return out


@pytest.fixture(scope="module")
def data(folder) -> Pairs:
    return datasets.build("pairs", None, {"path": str(folder)})


def test_folder_and_data_set(folder, data, tiny_run):
    assert sorted(contents(folder)) == [*(f"{name}.safetensors" for name in NAMES), "manifest.json"]
    snap = snapshot.load(tiny_run)
    assert json.loads((folder / "manifest.json").read_text()) == {
        **snapshot.network_record(snap.config), "real_fingerprint": datasets.build("digits", None, {}).fingerprint(),
        "weights_sha256": snap.sha256, "sampling_method": "heun", "sampling_steps": 3, "guidance_scale": 2,
        "guidance_interval": [0, 1], "guide": None, "seed": 4, "labels": None, "mixed_precision": "no", "bspp": 5,
        "generated": 40, "inverted": 10, "shard_pairs": 15, "state_times": [], "image_shape": [1, 8, 8],
        "class_names": list("0123456789"), "data": {"name": "digits", "root": None, "args": {}},
    }  # fmt: skip
    assert data.images.shape == (50, 1, 8, 8) and data.images.dtype == torch.float16
    assert data.generated == 40 and data.noise.shape == (10, 1, 8, 8)
    assert data.labels[:40].bincount().tolist() == [4] * 10  # balanced
    assert load_file(folder / "generated_00000.safetensors").keys() == {"images", "labels"}  # the noise is not stored


def test_an_image_is_what_its_noise_is_turned_into(data, tiny_run):
    """Images of the data set against the sampling function, started from the noise that training will use."""
    model = snapshot.load(tiny_run).model(decode=False)
    settings = SamplerSettings("heun", 3, 2.0, seed=4)
    for indices in index_batches(range(40), 5):
        batch = sample_batch(model, indices, settings, torch.device("cpu"), x0=model.draw_x0("pairs", 4, indices))
        k = slice(indices.start, indices.stop)
        assert torch.equal(batch.x.half(), data.images[k]) and torch.equal(batch.labels, data.labels[k])
    given = PairedCoupling(GaussianSource(), data.image_shape, data)
    assert torch.equal(given.sample_x0(range(3), [7, 39, 41], data.images, None), torch.cat([
        gaussian_noise("pairs", 4, [7, 39], (1, 8, 8)), data.noise[1:2].float()
    ]))  # fmt: skip


def test_inverted_pairs_are_real_images(data):
    real = datasets.build("digits", None, {})
    pixels = (data.images[40:].float() * 127.5 + 127.5).round().to(torch.uint8)
    for image, label in zip(pixels, data.labels[40:], strict=True):
        (same,) = (real.images == image).flatten(1).all(1).nonzero(as_tuple=True)
        assert label in real.labels[same]


def test_noise_of_a_real_image_leads_to_it(here, tmp_path, tiny_run):
    """By its own label and without guidance, but for what is mixed into an image before its flow is solved backwards."""
    snap = snapshot.load(tiny_run)
    torch.manual_seed(0)
    weights = {name: w + 0.1 * torch.randn_like(w) if w.is_floating_point() else w for name, w in snap.weights.items()}
    far, out = tmp_path / "far.safetensors", tmp_path / "pairs"
    snapshot.save(far, weights, snap.config, (1, 8, 8), 4, 100)
    steps = ["--sampling_steps", 20, "--guidance_scale", 3]  # the guidance is for generated pairs alone
    here("make_pairs", "--weights", far, "--save_dir", out, "--n_pairs", 10, "--real_fraction", 1, *steps)
    pairs = datasets.build("pairs", None, {"path": str(out)})
    ends = Sampler.load(far, "cpu").transfer(pairs.noise.float(), labels=pairs.labels.tolist(), steps=20)
    error = (to_float(ends) - pairs.images.float()).square().mean().sqrt()
    assert error < 0.1  # 0.44 with other labels, 0.46 from the images themselves, 0.78 with guidance


def test_damaged_shards_are_made_again(here, tmp_path, folder, tiny_run):
    """Missing and damaged shards are named, and only they are made again."""
    copy = tmp_path / "pairs"
    copy.mkdir()
    for name, data in contents(folder).items():
        (copy / name).write_bytes(data)
    (copy / "generated_00000.safetensors").unlink()
    damaged = bytearray((copy / "inverted_00000.safetensors").read_bytes())
    damaged[-3] ^= 1
    (copy / "inverted_00000.safetensors").write_bytes(damaged)
    with pytest.raises(ValueError, match=r"generated_00000\.safetensors is missing; run make_pairs"):
        datasets.build("pairs", None, {"path": str(copy)})
    before = {name: (copy / name).stat().st_mtime_ns for name in contents(copy)}
    printed = here("make_pairs", "--weights", tiny_run, "--save_dir", copy, *ARGUMENTS)
    assert "inverted_00000.safetensors is damaged" in printed and "25 of them new" in printed
    assert contents(copy) == contents(folder)
    touched = {name for name, stamp in before.items() if (copy / name).stat().st_mtime_ns != stamp}
    assert touched == {"inverted_00000.safetensors"}  # and the one that was not there


@pytest.mark.parametrize("text", ["{", "[]", '{"seed": 1}', '{"data": {"name": "mnist"}}'])
def test_a_manifest_of_something_else(tmp_path, text):
    (tmp_path / "manifest.json").write_text(text)
    with pytest.raises(ValueError, match="is damaged or not that of pairs"):
        datasets.build("pairs", None, {"path": str(tmp_path)})


def test_two_processes_write_the_same_bytes(group, tmp_path, folder, tiny_run):
    out = tmp_path / "two"
    group("make_pairs", "--weights", tiny_run, "--save_dir", out, *ARGUMENTS)
    assert contents(out) == contents(folder)


@pytest.mark.slow
def test_a_kill_costs_one_shard(tmp_path, tiny_run):
    """Killed once two shards are there: they stay as they are, and the folder ends as if nothing had happened."""
    command = ["-m", "scripts.make_pairs", "--weights", str(tiny_run), "--n_pairs", "320", "--shard_pairs", "40"]
    command += ["--sampling_steps", "20", "--bspp", "40"]
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    environment = {**os.environ, "FLOW_NUM_THREADS": "1"}
    process = subprocess.Popen([sys.executable, *command, "--save_dir", str(cut)], cwd=REPOSITORY, env=environment)
    wait_until(lambda: len(list(cut.glob("generated_*"))) >= 2, process)
    process.send_signal(signal.SIGKILL)
    process.wait()
    there = {p: p.stat().st_mtime_ns for p in cut.glob("generated_*")}
    assert 2 <= len(there) < 8
    result = succeed(*command, "--save_dir", cut)
    assert f"{320 - 40 * len(there)} of them new" in result.stdout
    assert all(p.stat().st_mtime_ns == stamp for p, stamp in there.items())
    succeed(*command, "--save_dir", whole)
    assert contents(cut) == contents(whole)


def test_other_settings_do_not_mix(error, folder, tiny_run):
    before = contents(folder)
    line = error("make_pairs", "--weights", tiny_run, "--save_dir", folder, *ARGUMENTS, "--sampling_steps", "4")
    assert "holds pairs of another run (sampling_steps 3, now 4)" in line
    line = error("make_pairs", "--weights", tiny_run, "--save_dir", folder, *ARGUMENTS, "model.args.dropout=0.1")
    assert "holds pairs of another run (model {" in line
    assert contents(folder) == before


def test_pairs_with_states_and_without_do_not_mix(here, error, tmp_path, tiny_run):
    states = {"with": ["--keep_states", "2"], "without": []}
    command = ["make_pairs", "--weights", tiny_run, "--n_pairs", "10", "--sampling_steps", "3", "--save_dir"]
    for name, other in (("with", "without"), ("without", "with")):
        here(*command, tmp_path / name, *states[name])
        before = contents(tmp_path / name)
        line = error(*command, tmp_path / name, *states[other])
        assert f"{tmp_path / name}: holds pairs of another run (state_times " in line
        assert contents(tmp_path / name) == before


def test_mistakes(error, tmp_path, tiny_run, folder):
    (tmp_path / "mine.txt").write_text("mine")
    command = ["make_pairs", "--weights", tiny_run, "--n_pairs", "10"]
    assert "exists and was not written by make_pairs" in error(*command, "--save_dir", tmp_path)
    assert "--labels 11: is out of range" in error(*command, "--save_dir", tmp_path / "a", "--labels", "11")
    assert "'1.5': must be a number from 0 to 1" in error(*command, "--save_dir", tmp_path / "a", "--real_fraction", "1.5")
    many = ["--n_pairs", "4000", "--real_fraction", "0.5"]
    assert "2000 pairs of 1797 real images" in error(*command, "--save_dir", tmp_path / "a", *many)
    assert not (tmp_path / "a").exists()
    train = ["train", *TINY_TRAIN, "-e", tmp_path / "run"]
    assert "flow.coupling=paired: with data.name=digits; set flow.coupling=paired and data.name=pairs, or neither" in error(
        *train, "flow.coupling=paired"
    )
    paired = ["data.name=pairs", f"data.args.path={folder}", "flow.coupling=paired", "flow.coupling_args={block: 4}"]
    assert "flow.coupling=paired: paired has no argument 'block'; it takes none" in error(*train, *paired)
    assert "holds no pairs (manifest.json is not there)" in error(*train, "data.name=pairs", f"data.args.path={tmp_path}")


def test_data_without_classes(here, error, tmp_path, tiny_run):
    """Generated images get the labels that are asked for; a network with text has no words for them."""
    folder = tmp_path / "images"
    folder.mkdir()
    Image.new("L", (8, 8), 40).save(folder / "0.png")
    data = ["data.name=folder", f"data.args={{path: {folder}, channels: 1}}"]
    few = ["--n_pairs", "4", "--sampling_steps", "1"]
    here("make_pairs", "--weights", tiny_run, "--save_dir", tmp_path / "pairs", *few, "--labels", "3", *data)
    assert datasets.build("pairs", None, {"path": str(tmp_path / "pairs")}).labels.tolist() == [3] * 4
    args = {"width": 8, "head_channels": 8, "max_prompt_bytes": 16}
    net = models.build("mini_unet", (1, 8, 8), args)
    cfg = loading.load(None, ["model.name=mini_unet", f"model.args={json.dumps(args)}"])
    snapshot.save(tmp_path / "text.safetensors", net.state_dict(), cfg, (1, 8, 8), 1, 100)
    line = error("make_pairs", "--weights", tmp_path / "text.safetensors", "--save_dir", tmp_path / "text", *few, *data)
    assert "data: has no classes, whose names a network with text reads" in line and not (tmp_path / "text").exists()


def test_pairs_without_the_training_images(here, error, tmp_path):
    """Their names and labels are in the snapshot; real images to invert are not."""
    folder = tmp_path / "images"
    for name in ("cat", "dog"):
        (folder / name).mkdir(parents=True)
        Image.new("L", (8, 8), 40).save(folder / name / "0.png")
    data = ["data.name=folder", f"data.args={{path: {folder}, channels: 1}}", "model.args.num_classes=2", "train.batch_size=2"]
    here("train", *TINY_TRAIN, *data, "-e", tmp_path / "run")
    shutil.rmtree(folder)
    few = ["make_pairs", "--weights", tmp_path / "run", "--n_pairs", 4, "--sampling_steps", 1, "--save_dir"]
    printed = here(*few, tmp_path / "pairs")
    assert "note: these pairs are made without the training images (data: path=" in printed and str(folder) in printed
    pairs = datasets.build("pairs", None, {"path": str(tmp_path / "pairs")})
    assert pairs.labels.tolist() == [0, 1, 0, 1] and pairs.class_names == ("cat", "dog")
    line = error(*few, tmp_path / "real", "--real_fraction", 0.5)
    assert line.startswith("error: --real_fraction: needs the training images: data: ") and str(folder) in line
    assert not (tmp_path / "real").exists()


def test_labels_need_labelled_real_images():
    data = Images(torch.zeros(3, 1, 8, 8, dtype=torch.uint8), None, ())
    assert sorted(make_pairs.invertible(data, None, 0)) == [0, 1, 2]
    with pytest.raises(ValueError, match="--labels: the real images of --real_fraction have no labels"):
        make_pairs.invertible(data, (1,), 0)


def test_training_on_pairs_resumes_exactly(here, tmp_path, folder, tiny_run):
    """Reflow through the one trainer; 2 + 2 steps are 4 steps, to the bit."""
    given = ["flow.coupling=paired", "data.name=pairs", f"data.args.path={folder}", f"train.init_from={tiny_run}"]
    reflow = [*TINY_TRAIN, *given, "flow.time_sampler=u_shaped", "loss.args.distance=pseudo_huber"]
    here("train", *reflow, "-e", tmp_path / "whole")
    here("train", *reflow, "-e", tmp_path / "cut", "train.steps=2")
    here("train", "-e", tmp_path / "cut", "-r", "latest", "train.steps=4")
    whole, cut = (load_file(locate.find(tmp_path / name)) for name in ("whole", "cut"))
    assert all(torch.equal(whole[name], cut[name]) for name in whole)


def test_pairs_of_points_are_trained_on(points_flow, tmp_path, here):
    teacher, folder = points_flow("moons", 1), tmp_path / "pairs"
    here("make_pairs", "--weights", teacher, "--n_pairs", "50", "--real_fraction", "0.2", "--save_dir", folder)
    pairs = datasets.build("pairs", None, {"path": str(folder)})
    assert pairs.images.shape == (50, 2) and pairs.noise.shape == (10, 2) and pairs.labels is None
    real = datasets.build("toys", None, {"name": "moons", "n": POINTS}).images.half()
    assert all((real == x1).all(1).any() for x1 in pairs.images[40:])
    x0 = gaussian_noise("pairs", 0, range(40), (2,))
    assert not torch.allclose(pairs.images[:40].float(), x0)
    small = ["train.steps=2", "train.batch_size=20", "train.log_with=[]", "preview.n_samples=20", "model.args={width: 16}"]
    given = [f"data.args.path={folder}", f"train.init_from={teacher}", "-e", tmp_path / "run"]
    here("train", "-c", "configs/toy_reflow.yaml", *small, *given)
    printed = here("evaluate", "--weights", tmp_path / "run", "--n_samples", "50", "--sampling_steps", "2")
    assert "| toys moons |" in printed and "SW2" in printed  # against the real points
