"""A folder with a subfolder for each class: found at the start of training, named to sample.py and the others."""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from conftest import run_here
from PIL import Image

from flow.sampling import snapshot

SMALL_TRAIN = [
    "model.args={width: 16, patch: 2, channel_mult: [1, 2], attention_resolutions: [4], head_channels: 16}",
    "train.batch_size=4", "train.sample_every_steps=0", "train.log_with=[]", "train.mixed_precision=no",
    "data.num_workers=0", "preview.n_samples=2", "preview.sampling_steps=1",
]  # fmt: skip
PHOTOS = ["-c", "configs/photos64.yaml", *SMALL_TRAIN]


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> Path:
    """Two classes of 16x16 pixels with what other programs leave in such a folder."""
    folder = tmp_path_factory.mktemp("data") / "my photos"
    rng = np.random.default_rng(0)
    for name in ("discs", "cats"):
        (folder / name).mkdir(parents=True)
        for k in range(3):
            Image.fromarray(rng.integers(0, 256, (20, 16, 3), dtype=np.uint8)).save(folder / name / f"{k}.png")
    (folder / "cats/._0.png").write_bytes(b"\0\5\26\7 resource fork")
    (folder / ".DS_Store").write_bytes(b"\0")
    (folder / "notes.txt").write_text("who is on these photos")
    return folder


@pytest.fixture(scope="module")
def trained(photos, tmp_path_factory) -> Path:
    run = tmp_path_factory.mktemp("runs") / "photos"
    said = run_here("train", *PHOTOS, data(photos), "-e", run, "train.steps=1")
    assert "2 classes (cats, discs)" in said
    assert said.count("skipped 3 files (.DS_Store, cats/._0.png, notes.txt)") == 1, said
    return run


def test_names_of_classes_are_text(error, photos, tmp_path):
    """A snapshot holds them, so the training would end in weights that nothing can read."""
    folder = tmp_path / "latin"
    folder.mkdir()
    os.rename(shutil.copytree(photos / "cats", folder / "cats"), os.fsencode(folder) + b"/caf\xe9")
    line = error("train", *PHOTOS, data(folder), "-e", tmp_path / "run")
    assert "the name of the class folder 'caf\\udce9' is not UTF-8; rename it" in line


def data(folder: Path) -> str:
    return f"data.args={{path: '{folder}', size: 16}}"


def test_classes_are_used_and_known_by_name(here, error, trained, tmp_path):
    assert "num_classes: 2" in (trained / "config.yaml").read_text()
    assert snapshot.load(trained).class_names == ("cats", "discs")

    here("sample", "--weights", trained, "--n_samples", 2, "--save_dir", tmp_path / "a", "--sampling_steps", 1,
         "--labels", "discs", "0")  # fmt: skip
    assert json.loads((tmp_path / "a/sampling.json").read_text())["labels"] == [1, 0]
    for script, more in {
        "sample": ["--n_samples", 2, "--save_dir", tmp_path / "x"],
        "make_pairs": ["--n_pairs", 2, "--save_dir", tmp_path / "x"],
        "evaluate": ["--out", tmp_path / "x"],
    }.items():
        message = error(script, "--weights", trained, *more, "--labels", "discs", "disks")
        assert "--labels disks: unknown class; the classes are cats, discs. Did you mean 'discs'?" in message
        assert "--labels 2: is out of range" in error(script, "--weights", trained, *more, "--labels", "2")
    assert not (tmp_path / "x").exists()


def test_names_reach_the_pairs_and_their_snapshot(here, photos, trained, tmp_path):
    here("make_pairs", "--weights", trained, "--n_pairs", 4, "--save_dir", tmp_path / "pairs", "--sampling_steps", 1,
         "--labels", "discs")  # fmt: skip
    pairs = ["data.name=pairs", f"data.args.path={tmp_path / 'pairs'}", "flow.coupling=paired", f"train.init_from={trained}"]
    small = [*SMALL_TRAIN, "model.args.blocks_per_level=1", "model.args.num_classes=auto", "train.steps=1"]
    here("train", *small, *pairs, "-e", tmp_path / "reflow")
    assert snapshot.load(tmp_path / "reflow").class_names == ("cats", "discs")


@pytest.mark.parametrize("config", [[], PHOTOS])
def test_a_resumed_run_keeps_the_number_it_began_with(here, photos, trained, tmp_path, config):
    run = shutil.copytree(trained, tmp_path / "run")
    assert "finished step 2" in here("train", *config, data(photos), "-e", run, "-r", "latest", "train.steps=2")


def test_further_classes_before_a_checkpoint(error, photos, trained, tmp_path):
    """No checkpoint tells the names of those that the run began with."""
    run = shutil.copytree(trained, tmp_path / "run", ignore=shutil.ignore_patterns("checkpoints", "snapshots"))
    more = shutil.copytree(photos, tmp_path / "photos")
    shutil.copytree(more / "cats", more / "birds")
    line = error("train", data(more), "-e", run, "-r", "latest", "train.steps=2")
    assert "num_classes=2: the data set has 3 classes; remove those that the run did not have, or start a new run" in line


@pytest.mark.parametrize(
    ("arguments", "told", "stored"),
    [
        (["data.name=folder", *SMALL_TRAIN], "2 classes (cats, discs)", "num_classes: 2"),  # unset
        (["data.name=folder", *SMALL_TRAIN, "model.args.num_classes=null"], ", no labels\n", "num_classes: null"),
        (["data.name=digits", *SMALL_TRAIN], "no labels (model.args.num_classes=auto would use the 10 classes", None),
    ],
)
def test_only_a_folder_has_auto_as_its_default(here, photos, tmp_path, arguments, told, stored):
    more = [data(photos)] if "data.name=folder" in arguments else []
    assert told in here("train", *arguments, *more, "-e", tmp_path / "run", "train.steps=1")
    text = (tmp_path / "run/config.yaml").read_text()
    assert stored in text if stored else "num_classes" not in text


def test_single_class_has_no_labels(here, photos, tmp_path):
    """Images beside the subfolders have no labels, nor has a single class."""
    folder = tmp_path / "mixed"
    (folder / "a").mkdir(parents=True)
    for name in ("a/0.png", "a/1.png", "stray.png"):
        Image.new("RGB", (16, 16)).save(folder / name)
    said = here("train", *PHOTOS, data(folder), "-e", tmp_path / "one", "train.steps=1")
    assert "no classes, as 1 file (stray.png) beside the subfolders" in said and "no labels" in said
    (folder / "stray.png").unlink()
    assert "no labels" in here("train", *PHOTOS, data(folder), "-e", tmp_path / "two", "train.steps=1")


def test_flips_of_points_are_refused(error, tmp_path):
    message = error("train", "-c", "configs/toy.yaml", "-e", tmp_path / "run", "data.horizontal_flip=true")
    assert message == "error: data.horizontal_flip=true: points have no mirror image; set it to false"


def test_where_held_out_images_come_from(error, photos, tmp_path):
    message = error("train", *PHOTOS, data(photos), "-e", tmp_path / "run", "evaluate.loss_every_steps=1")
    assert "has no held-out part; set it to 0, or pack these and held-out images by scripts.pack_images" in message
    assert "data.args.held_out" in message
