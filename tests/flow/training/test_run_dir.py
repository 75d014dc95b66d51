"""The folder of a run: what resuming cannot change, and what it cleans."""

import re
import shutil
from pathlib import Path

import pytest
from conftest import REPOSITORY, TINY_TRAIN
from PIL import Image

from configs import keys
from configs.errors import UserError
from configs.schema import Config
from configs.vae import VaeConfig
from flow.training import run_dir


def test_half_deleted_checkpoint_is_cleaned(here, tiny_run, tmp_path):
    """The run was killed while it deleted an old checkpoint after its last one, and has no further one to write."""
    run = shutil.copytree(tiny_run, tmp_path / "run")
    half = shutil.copytree(run / "checkpoints/step_00000004", run / "checkpoints/.tmp-step_00000002")
    (half / "state.json").unlink()
    here("train", "-e", run, "-r", "latest")
    assert [path.name for path in (run / "checkpoints").iterdir() if path.name.startswith(".tmp")] == []


def test_weights_that_began_a_run_stay(here, error, tiny_run, tmp_path):
    """Where there is a checkpoint others would be recorded and not read; before the first one they are read."""
    run, without_checkpoint = tmp_path / "run", tmp_path / "without_checkpoint"
    shutil.copytree(tiny_run, run)
    before = (run / "config.yaml").read_text()
    last_checkpoint = run / "checkpoints" / "step_00000004"
    for given in ([], TINY_TRAIN):  # with the stored configuration, and with one of -c
        line = error("train", *given, "-e", run, "-r", "latest", f"train.init_from={tiny_run}")
        assert (
            f"train.init_from={tiny_run}: the checkpoint {last_checkpoint} was made with None, which resuming cannot change"
            in line
        )
    assert (run / "config.yaml").read_text() == before
    shutil.copytree(tiny_run, without_checkpoint, ignore=shutil.ignore_patterns("checkpoints", "snapshots", "metrics.jsonl"))
    here("train", "-e", without_checkpoint, "-r", "latest", f"train.init_from={tiny_run}", "train.steps=1")
    assert f"init_from: {tiny_run}" in (without_checkpoint / "config.yaml").read_text()


def test_changes_by_the_yaml_are_noted(here, tiny_run, tmp_path):
    """-c begins again from the file, without what the first command line said."""
    run = shutil.copytree(tiny_run, tmp_path / "run")
    printed = here("train", *TINY_TRAIN, "-e", run, "-r", "latest", "train.steps=5")
    assert "note: -c" not in printed
    without = [word for word in TINY_TRAIN if not word.startswith("preview.")]
    printed = here("train", *without, "-e", run, "-r", "latest", "train.steps=6")
    (note,) = re.findall("note: -c configs/digits.yaml changes (.+); resume without -c", printed)
    assert "preview.sampling_steps=18 (was 1)" in note and "train.steps" not in note


@pytest.fixture
def photos(tmp_path, here) -> tuple[Path, list]:
    """The folder of two classes with a picture each, and the flags of the run that was trained on it."""
    for k, name in enumerate(("cat", "dog")):
        (tmp_path / "photos" / name).mkdir(parents=True)
        Image.new("L", (8, 8), 40 * k).save(tmp_path / "photos" / name / "0.png")
    flags = [word for word in TINY_TRAIN if not word.startswith("model.")]
    data = ["data.name=folder", f"data.args={{path: {tmp_path / 'photos'}, channels: 1}}", "train.batch_size=2"]
    here(
        "train",
        *flags,
        "model.name=mini_unet",
        "model.args.width=8",
        "model.args.head_channels=8",
        *data,
        "-e",
        tmp_path / "run",
    )
    return tmp_path / "photos", ["train", "-e", tmp_path / "run", "-r", "latest", "train.steps=5"]


def test_moved_data_are_resumed_on(photos, here):
    folder, resume = photos
    moved = folder.rename(folder.with_name("elsewhere"))
    printed = here(*resume, f"data.args.path={moved}")
    assert "finished step 5" in printed and "samples at the checkpoint" not in printed


@pytest.mark.parametrize("name", ["folder", "pairs"])
def test_only_pairs_keep_their_place(name):
    """Those of another folder may be of another teacher."""
    before, now = Config(), Config()
    for config, path in ((before, "a"), (now, "b")):
        config.data.name, config.data.args = name, {"path": path}
    if name == "folder":
        run_dir.refuse_changes(before, now, "the run was started")
    else:
        with pytest.raises(UserError, match="which resuming cannot change"):
            run_dir.refuse_changes(before, now, "the run was started")


def test_another_number_of_images_is_noted(photos, here):
    folder, resume = photos
    shutil.copy(folder / "cat/0.png", folder / "cat/1.png")
    assert "note: the data set had 2 samples at the checkpoint and has 3 now" in here(*resume)


def test_other_images_are_noted(photos, here):
    """As many as before, with other pixels."""
    folder, resume = photos
    shutil.copy(folder / "dog/0.png", folder / "cat/0.png")
    assert "note: the data set has other samples than at the checkpoint" in here(*resume)


@pytest.mark.parametrize(
    ("renamed", "added", "now"),
    [
        ("cat", "zebra", "dog, zebra now: remove zebra and restore cat"),  # the labels would go to each other
        (None, "bird", "bird, cat, dog now: remove bird"),
        ("cat", None, "dog now: restore cat"),
    ],
)
def test_other_classes_are_refused(photos, error, renamed, added, now):
    folder, resume = photos
    if renamed:
        shutil.move(folder / renamed, folder.parent / "elsewhere")
    if added:
        shutil.copytree(folder / "dog", folder / added)
    line = error(*resume)
    assert f"the run was trained with the classes cat, dog; the data set has {now}, or start a new run" in line


def test_checkpoint_named_in_its_own_folder(here, tiny_run, tmp_path, monkeypatch):
    run = tmp_path / "run"
    shutil.copytree(tiny_run, run)
    monkeypatch.chdir(run / "checkpoints")
    printed = here("train", "-r", "step_00000004", "train.steps=5")
    assert "finished step 5" in printed and f"sample.py --weights {run} " in printed


def test_what_a_resume_keeps_is_on_the_page():
    """docs/commands.md names the keys and sections that a resumed run may not change; of an autoencoder it is its section."""
    page = " ".join((REPOSITORY / "docs/commands.md").read_text().split())
    sentence = page.partition("A resumed run may change ")[2].partition(", but not ")[2].partition(". ")[0]
    names = re.findall("`([^`]+)`", sentence)
    fixed = {key for key in keys.all_keys(Config) for name in names if key == name or key.startswith(f"{name}.")}
    autoencoder = {key for key in keys.all_keys(VaeConfig) if key.startswith("autoencoder.")}
    assert set(run_dir.FIXED_BY_CHECKPOINT) == fixed - {"flow.label_dropout"} | autoencoder


@pytest.mark.parametrize("key", run_dir.FIXED)
def test_no_fixed_key_changes_on_resume(key):
    """Each is named with both values; without a change nothing is refused."""
    kind = VaeConfig if key.startswith("autoencoder.") else Config
    stored, cfg = kind(), kind()
    run_dir.refuse_changes(stored, cfg, "the run was started")
    section, _, name = key.rpartition(".")
    before = keys.get(stored, key)
    after = {dict: {"more": 1}, list: [7]}.get(type(before)) or (f"other_{before}" if isinstance(before, str) else before + 1)
    setattr(keys.get(cfg, section) if section else cfg, name, after)
    with pytest.raises(UserError, match=re.escape(f"{key}={after}: the run was started with {before}, which resuming cannot")):
        run_dir.refuse_changes(stored, cfg, "the run was started")
