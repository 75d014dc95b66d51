"""The row of real images: held-out ones, or one half of the reference against the other."""

import shutil

import pytest
import torch
from digits_features import write_folder

import datasets
from flow.evaluation import control, results


def test_other_held_out_images_are_another_row(here, tmp_path, tiny_run, packed_digits):
    """Of real images: the folder of the held-out ones may be made anew."""
    command = ["evaluate", "--weights", tiny_run, "--feature_extractor", "digits", "--metrics", "fid", "--sampling_steps", 1]
    command += ["--n_samples", 8, f"data.root={tmp_path}", "--out", tmp_path / "out", "data.name=packed"]
    for name in ("test", "other", "test"):
        here(*command, f"data.args={{path: {packed_digits / 'train'}, held_out: {packed_digits / name}}}")
    rows = results.read(tmp_path / "out")
    assert [row["weights"] for row in rows] == ["real (held-out images)", "tiny@4", "real (held-out images)"]
    assert rows[0]["metrics"] != rows[2]["metrics"]


def test_damaged_held_out_images_are_an_error(error, tmp_path, tiny_run, packed_digits):
    """In the words of what they are for; a folder that is not there is a warning."""
    shutil.copytree(packed_digits / "test", tmp_path / "test")
    for path in (tmp_path / "test").glob("*.safetensors"):
        path.write_bytes(path.read_bytes()[:-100])
    command = ["evaluate", "--weights", tiny_run, "--feature_extractor", "digits", "--metrics", "fid", "--sampling_steps", 1]
    command += ["--n_samples", 8, f"data.root={tmp_path}", "--out", tmp_path / "out", "data.name=packed"]
    line = error(*command, f"data.args={{path: {packed_digits / 'train'}, held_out: {tmp_path / 'test'}}}")
    assert line.startswith("error: row of real images: ") and "images_" in line


def test_choice_by_frequency():
    """Classes are as frequent as in the reference; one that runs out is replaced, so that the number stays."""
    pool, labels = [5, 4, 3, 2, 1, 0], torch.tensor([0, 0, 0, 1, 1, 1])
    assert control.choose_by_frequency(pool, labels, torch.tensor([0, 0, 1]), 3) in ([2, 1, 5], [2, 5, 1])
    assert sorted(control.choose_by_frequency(pool, labels, torch.tensor([0, 0, 1]), 6)) == sorted(pool)
    assert control.choose_by_frequency(pool, labels, torch.tensor([0]), 4) == [2, 1, 0, 5]
    assert control.choose_by_frequency(pool, None, None, 2) == [5, 4]


@pytest.mark.slow
def test_the_row_of_real_images_of_mnist(here, tmp_path, real_data):
    """Test images against training ones, and the other way round."""
    samples = write_folder(tmp_path / "samples", datasets.build("mnist", real_data, {"train": False}).images[:1000])
    for name, kind in (("mnist", "test split"), ("mnist:test", "train split")):
        out = tmp_path / kind
        here("evaluate", "--samples", samples, "--reference", name, "--feature_extractor", "mnist", "--out", out)
        control = next(row for row in results.read(out) if results.is_control(row))
        assert control["weights"] == f"real ({kind})" and control["n"] == 1000
        assert 0.7 < control["metrics"]["FD-mnist"] < 1.8 and control["metrics"]["accuracy"] > 0.98


def test_classes_of_real_images_after_one_without(here, tmp_path, tiny_run):
    """The row of real images has its distances of classes once somebody asks who has classes."""
    unlabeled, out = write_folder(tmp_path / "unlabeled", datasets.build("digits", None, {}).images[:1200]), tmp_path / "out"
    common = ["--feature_extractor", "digits", "--metrics", "fid", "per_class", "--out", out]
    here("evaluate", "--samples", unlabeled, "--reference", "digits", *common, f"data.root={tmp_path}")
    here("evaluate", "--weights", tiny_run, "--sampling_steps", 1, "--n_samples", 1200, *common)
    assert any(map(results.is_class_column, next(filter(results.is_control, results.read(out)))["metrics"]))


def test_no_row_of_a_reference_too_small(here, tmp_path, tiny_run):
    """A half of three images is one, from which no distance is to be had."""
    folder = write_folder(tmp_path / "three", datasets.build("digits", None, {}).images[:3])
    command = ["evaluate", "--weights", tiny_run, "--feature_extractor", "digits", "--sampling_steps", 1, "--n_samples", 8]
    printed = here(*command, "--reference", folder, f"data.root={tmp_path}", "--out", tmp_path / "out")
    assert f"note: no row of real images: {folder} has too few" in printed
    assert [results.is_control(row) for row in results.read(tmp_path / "out")] == [False]
