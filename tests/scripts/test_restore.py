"""scripts.restore: what it writes, a second call, several processes, mistakes of a user."""

import json
import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import TINY_RUN, run_here, stranger
from PIL import Image

import datasets
from flow.evaluation import restoration
from flow.restoration import Inpainting, box_mask, random_masks
from flow.sampling import images
from scripts import restore

QUICK = ["--steps", "3", "--draws", "1", "--n_images", "5"]


@pytest.fixture(scope="module")
def held_out_run(tmp_path_factory):
    """A run of 4 steps on the training split of the digits, with labels and without their dropout."""
    run = tmp_path_factory.mktemp("runs") / "split"
    network = ["model.name=mlp", "model.args={width: 8, depth: 1, num_classes: 10}"]
    more = ["data.args.split=train", "flow.label_dropout=0"]
    run_here("train", "-c", "configs/digits.yaml", *network, *TINY_RUN, *more, "-e", run)
    return run


@pytest.fixture(scope="module")
def color_run(tmp_path_factory):
    """A run of 4 steps on six color images of 8x8 pixels, without labels, and the folder of the images."""
    folder = tmp_path_factory.mktemp("colors")
    for k in range(6):
        pixels = np.random.default_rng(k).integers(0, 256, (8, 8, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{k}.png")
    run = tmp_path_factory.mktemp("runs") / "colors"
    network = ["model.name=mlp", "model.args={width: 8, depth: 1}"]
    data = ["data.name=folder", f"data.args={{path: {folder}, size: 8}}"]
    run_here("train", "-c", "configs/digits.yaml", *network, *data, *TINY_RUN, "train.batch_size=4", "-e", run)
    return run, folder


def scores(folder):
    return {entry["method"]: entry for entry in json.loads((folder / "restore.json").read_text())["scores"]}


def test_outputs_and_second_call(here, error, tiny_run, tmp_path):
    """A second call prints the same table without work; other settings are refused."""
    out = tmp_path / "restored" / "box"
    arguments = ["--weights", tiny_run, "--task", "inpaint", "--mask_box", "4", "--noise", "0", "--save_dir", out, *QUICK]
    text = here("restore", *arguments)
    assert "note: this data set has no held-out part" in text
    assert {p.name for p in out.iterdir()} == {"images", "restore.json", "restore.md", "restore.png"}
    assert list(scores(out)) == ["degraded", "median fill", "biharmonic", "PnP-Flow"]
    assert all(len(entry["psnr"]) == len(entry["ssim"]) == 5 for entry in scores(out).values())
    first = (out / "images" / "000004.png").read_bytes()
    written = (out / "images" / "000004.png").stat().st_mtime_ns
    again = here("restore", *arguments)
    assert (out / "restore.md").read_text().strip() in text and (out / "restore.md").read_text().strip() in again
    assert (out / "images" / "000004.png").stat().st_mtime_ns == written
    assert "holds images of another run (seed 8888, now 1)" in error("restore", *arguments, "--seed", "1")

    here("restore", *arguments[:-1], "4", "--bspp", "3", "--save_dir", tmp_path / "fewer")
    assert (tmp_path / "fewer" / "images" / "000003.png").read_bytes() == (out / "images" / "000003.png").read_bytes()
    assert first != (out / "images" / "000003.png").read_bytes()


def test_interrupted_call_continues(here, tiny_run, tmp_path):
    """A folder with the settings alone is of a run that was killed."""
    arguments = ["--weights", tiny_run, "--task", "deblur", "--blur", "1", "--save_dir", tmp_path / "out", *QUICK]
    here("restore", *arguments)
    record = json.loads((tmp_path / "out" / "restore.json").read_text())
    before = record.pop("scores")
    (tmp_path / "out" / "restore.json").write_text(json.dumps(record))
    here("restore", *arguments)
    assert list(scores(tmp_path / "out").values()) == before


def test_lost_files_are_made_again(here, error, tiny_run, tmp_path):
    out = tmp_path / "out"
    arguments = ["--weights", tiny_run, "--task", "deblur", "--blur", "1", "--save_dir", out, *QUICK]
    here("restore", *arguments)
    lost = {name: (out / name).read_bytes() for name in ("restore.md", "restore.png", "images/000002.png")}
    for name in lost:
        (out / name).unlink()
    here("restore", *arguments)
    assert {name: (out / name).read_bytes() for name in lost} == lost
    Image.new("L", (9, 8)).save(out / "images/000002.png")  # whole, but of another size
    here("restore", *arguments)
    assert {name: (out / name).read_bytes() for name in lost} == lost
    for damage in ("[]", '{"settings": [1]}', '{"settings": {}, "scores": [1]}'):
        (out / "restore.json").write_text(damage)
        assert f"{out / 'restore.json'}: is damaged; name another folder with --save_dir" in error("restore", *arguments)


def test_suggested_command_runs(here, tiny_run, tmp_path):
    text = here("restore", "--weights", tiny_run, "--task", "deblur", "--save_dir", tmp_path / "deblur", *QUICK)
    (line,) = re.findall(r"with: (.+)$", text, re.M)
    words = line.split()[line.split().index("scripts.restore") + 1 :]
    here("restore", *words, "--steps", "2", "--draws", "1")
    assert (tmp_path / "inpaint" / "restore.png").is_file()


@pytest.mark.parametrize("masks", [lambda k: random_masks(8, 8, 0.5, 0, k), lambda k: box_mask(8, 8, 3)])
def test_holes_are_filled_image_by_image(masks):
    """As they are where all images are filled at once."""
    originals = datasets.build("digits", None, {}).images[:4]
    y = Inpainting(masks(range(4))).known * (originals / 127.5 - 1)
    accelerator = SimpleNamespace(is_main_process=True)
    single = restore.simple_methods(accelerator, y, originals, lambda indices: Inpainting(masks(indices)))
    together = restoration.baselines(Inpainting(masks(range(4))), y, originals)
    assert single.keys() == together.keys() and all(single[name].equal(together[name]) for name in together)


def test_known_pixels_stay_without_noise(here, tiny_run, tmp_path):
    """White pixels of the mask are missing, the others are those of the image, to the level."""
    mask = np.zeros((8, 8), dtype=np.uint8)
    mask[2:5, 1:7] = 255
    Image.fromarray(mask).save(tmp_path / "mask.png")
    flags = ["--mask", tmp_path / "mask.png", "--noise", "0", "--labels", "3", "--guidance_scale", "2"]
    here("restore", "--weights", tiny_run, "--task", "inpaint", "--save_dir", tmp_path / "out", *flags, *QUICK)
    original = datasets.build("digits", None, {})[4][0]
    restored = torch.from_numpy(images.read_png(tmp_path / "out" / "images" / "000004.png")).permute(2, 0, 1)
    known = torch.from_numpy(mask == 0)
    assert restored[:, known].equal(original[:, known]) and not restored.equal(original)


def test_held_out_images(here, held_out_run, tmp_path):
    out = tmp_path / "out"
    flags = ["--factor", "2", "--labels", "0", "1"]
    text = here("restore", "--weights", held_out_run, "--task", "super_resolution", "--save_dir", out, *flags, *QUICK)
    assert "note" not in text
    assert json.loads((out / "restore.json").read_text())["settings"]["images"] == "digits, test split"
    assert list(scores(out)) == ["degraded", "bicubic", "PnP-Flow"]


def test_colors_of_a_folder(here, color_run, tmp_path):
    run, folder = color_run
    arguments = ["--weights", run, "--task", "colorize", "--images", folder, "--save_dir", tmp_path / "out"]
    text = here("restore", *arguments, "--steps", "3", "--n_images", "100", "--noise", "0")
    assert f"note: {folder} has 6 images" in text and "6 images in" in text
    assert scores(tmp_path / "out")["gray"]["psnr"] == scores(tmp_path / "out")["degraded"]["psnr"]
    assert images.read_png(tmp_path / "out" / "restore.png").shape[-1] == 3


def test_two_processes_equal_one(group, here, tiny_run, tmp_path):
    arguments = ["--weights", tiny_run, "--task", "inpaint", "--bspp", "2", *QUICK]
    here("restore", *arguments, "--save_dir", tmp_path / "one")
    group("restore", *arguments, "--save_dir", tmp_path / "two")
    one, two = ((tmp_path / name / "images" / "000003.png").read_bytes() for name in ("one", "two"))
    assert one == two and scores(tmp_path / "one") == scores(tmp_path / "two")


@pytest.mark.parametrize(
    "flags, message",
    [
        ("--task sharpen", "invalid choice: 'sharpen'"),
        ("--task deblur --factor 2", "--factor: is for --task super_resolution, not for deblur"),
        ("--task deblur --mask_box 2", "--mask_box: is for --task inpaint, not for deblur"),
        ("--task deblur --blur 0", "must be a finite number above 0"),
        ("--task deblur --blur 9", "must be at most the side of the images, 8 pixels"),
        ("--task deblur --bluur 2", "unknown flag '--bluur'. Did you mean '--blur'?"),
        ("--task super_resolution --factor 3", "8x8 pixels must be divisible by it"),
        ("--task colorize", "needs a flow of images with 3 channels, this one has 1"),
        ("--task inpaint --mask_box 8", "a box of 8 pixels does not fit into 8x8"),
        ("--task inpaint --mask_fraction 1", "must leave missing and known ones"),
        ("--task inpaint --mask_box 2 --mask_fraction 0.5", "not allowed with argument"),
        ("--task inpaint --mask nowhere.png", "nowhere.png: not a readable image"),
        ("--task inpaint --step_size 2", "--step_size 2: must be above 0 and below 2"),
        ("--task inpaint --noise -1", "must be a finite number of 0 or more"),
        ("--task inpaint --guidance_scale 2", "--guidance_scale 2: needs --labels"),
        ("--task inpaint --labels 10", "--labels 10: is out of range"),
        ("--task inpaint --n_images 1798", "--n_images 1798: digits, training images has 1797"),
        ("--task inpaint --images nowhere", "there is no such folder"),
    ],
)
def test_user_errors(error, tiny_run, tmp_path, flags, message):
    assert message in error("restore", "--weights", tiny_run, "--save_dir", tmp_path / "out", *flags.split())
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "pixels, message",
    [
        (np.full((7, 8), 255, np.uint8), "has 7x8 pixels, the images have 8x8"),
        (np.full((8, 8), 255, np.uint8), "must have white pixels"),
        (np.zeros((8, 8), np.uint8), "must have white pixels"),
    ],
)
def test_masks_that_do_not_fit(error, tiny_run, tmp_path, pixels, message):
    Image.fromarray(pixels).save(tmp_path / "mask.png")
    flags = ["--task", "inpaint", "--mask", tmp_path / "mask.png", "--save_dir", tmp_path / "out"]
    assert message in error("restore", "--weights", tiny_run, *flags)


def test_labels_are_needed_without_label_dropout(error, held_out_run, tmp_path):
    flags = ["--task", "deblur", "--save_dir", tmp_path / "out"]
    assert "flow.label_dropout=0" in error("restore", "--weights", held_out_run, *flags)


def test_latents_are_refused(error, tiny_run, tmp_path):
    shape = {"image_shape": [1, 16, 16], "shift": [0.0], "scale": [1.0]}
    codec = {"name": "vae", "source": "owner/name", "digest": 64 * "0", **shape}
    weights = stranger(tiny_run, tmp_path / "latent.safetensors", codec=json.dumps(codec))
    flags = ["--task", "deblur", "--save_dir", tmp_path / "out"]
    assert ": a flow of latents; only flows of pixels restore images" in error("restore", "--weights", weights, *flags)


def test_folder_of_something_else(error, tiny_run, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    message = error("restore", "--weights", tiny_run, "--task", "deblur", "--save_dir", tmp_path)
    assert "exists and was not written by scripts.restore" in message
