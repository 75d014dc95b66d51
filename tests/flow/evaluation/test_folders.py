"""Folders of samples: what `evaluate.py --samples DIR` reads and refuses."""

import json

import pytest
import torch
from digits_features import noisy_digits, write_folder
from PIL import Image

import datasets
from flow.evaluation import results


def test_two_processes_measure_a_folder(group, here, tmp_path):
    """The images being the same, so is every number, to the bit."""
    samples = write_folder(tmp_path / "samples", noisy_digits(1797)[:300])
    command = [
        "--samples",
        samples,
        "--reference",
        "digits",
        "--feature_extractor",
        "digits",
        "--metrics",
        "fid",
        "kid",
        "prc",
        "density_coverage",
        "--no_control",
    ]
    here("evaluate", *command, "--out", tmp_path / "one")
    group("evaluate", *command, "--out", tmp_path / "two")
    ([one], [two]) = (results.read(tmp_path / name) for name in ("one", "two"))
    for key in ("metrics", "standard_errors"):
        assert one[key] and two[key] == one[key]


def test_balanced_folder_is_warned_about(here, tmp_path, tiny_run):
    """A warning names a folder whose classes take turns."""
    here("sample", "--weights", tiny_run, "--n_samples", 66, "--sampling_steps", 1, "--save_dir", tmp_path / "samples")
    command = ["evaluate", "--samples", tmp_path / "samples", "--reference", "digits", "--feature_extractor", "digits"]
    assert "take turns over the classes, which are not equally frequent" in here(*command, f"data.root={tmp_path}")


def test_labels_follow_the_number_of_an_image(here, error, tmp_path):
    """Which is its name: a sample.py that was interrupted leaves gaps. The table of its folder lies in it."""
    data, folder = datasets.build("digits", None, {}), tmp_path / "samples"
    in_turn = torch.stack([data.images[data.labels == label][:7] for label in range(10)], dim=1).flatten(0, 1)
    write_folder(folder / "images", in_turn)
    (folder / "sampling.json").write_text('{"image_shape": [1, 8, 8], "labels": null, "num_classes": 10}')
    (folder / "images/0003.png").unlink()
    command = ["evaluate", "--samples", folder, "--reference", "digits", "--feature_extractor", "digits", "--no_control"]
    command += ["--metrics", "accuracy", f"data.root={tmp_path}"]
    here(*command)
    (row,) = results.read(folder / "evaluation")
    assert row["n"] == 69 and row["metrics"]["accuracy"] > 0.9
    (folder / "images/0004.png").rename(folder / "images/four.png")
    assert f"--samples {folder}: images/four.png is not an image of sample.py; move it out of this folder" in error(*command)
    (folder / "sampling.json").write_text('{"image_shape": [1, 8, 8], "labels": null, "num_classes": 0}')
    assert f"--samples {folder}: sampling.json cannot be used" in error(*command)


def test_images_of_two_sizes_are_named(error, tmp_path):
    write_folder(tmp_path / "mixed", datasets.build("digits", None, {}).images[:4])
    Image.new("L", (9, 8)).save(tmp_path / "mixed/0002.png")
    line = error("evaluate", "--samples", tmp_path / "mixed", "--reference", "digits", "--feature_extractor", "digits")
    assert f"--samples: {tmp_path / 'mixed/0002.png'}: has 8x9 pixels, expected 8x8" in line


def test_points_are_no_folder_of_images(here, error, points_flow, tmp_path):
    folder = tmp_path / "samples"
    here("sample", "--weights", points_flow("moons", 1), "--n_samples", 2, "--sampling_steps", 1, "--save_dir", folder)
    line = error("evaluate", "--samples", folder, "--reference", "toys:moons")
    assert f"--samples {folder}: sampling.json cannot be used: it is of points" in line and "with --weights" in line


def test_subfolders_are_labels_if_they_are_classes(here, tmp_path):
    """Others say nothing about classes: the folders of a generator that fills one after the other."""
    data = datasets.build("digits", None, {})
    for label in range(10):
        for name in (str(label), f"{label:06d}"):
            layout = "by_class" if name == str(label) else "in_turn"
            write_folder(tmp_path / layout / name, data.images[data.labels == label][:8])
    command = ["--reference", "digits", "--feature_extractor", "digits", "--no_control", "--metrics", "accuracy"]
    for layout in ("by_class", "in_turn"):
        here(
            "evaluate", "--samples", tmp_path / layout, *command, f"data.root={tmp_path}", "--out", tmp_path / f"{layout}_table"
        )
    by_class, in_turn = (results.read(tmp_path / f"{layout}_table")[0]["metrics"] for layout in ("by_class", "in_turn"))
    assert by_class["accuracy"] > 0.95 and in_turn == {}


def test_renamed_classes_are_measured_again(here, tmp_path):
    """What had no value before may have one with other names."""
    data, samples = datasets.build("digits", None, {}), tmp_path / "samples"
    for label in range(10):
        write_folder(samples / f"{label:06d}", data.images[data.labels == label][:8])
    command = ["evaluate", "--samples", samples, "--reference", "digits", "--feature_extractor", "digits", "--no_control"]
    command += ["--metrics", "accuracy", f"data.root={tmp_path}", "--out", tmp_path / "out"]
    here(*command)
    for label in range(10):
        (samples / f"{label:06d}").rename(samples / str(label))
    for _ in range(2):
        here(*command)
    before, after = results.read(tmp_path / "out")
    assert before["metrics"] == {} and after["metrics"]["accuracy"] > 0.95


def test_accuracy_beside_real_images_without_classes(here, tmp_path):
    """And a note says why a reference with subfolders has none."""
    data = datasets.build("digits", None, {})
    for label in range(10):
        write_folder(tmp_path / "samples" / str(label), data.images[data.labels == label][:8])
        write_folder(tmp_path / "real" / str(label), data.images[data.labels == label][8:16])
    (tmp_path / "real/0/0000.png").rename(tmp_path / "real/stray.png")
    command = ["--reference", tmp_path / "real", "--feature_extractor", "digits", "--no_control", "--metrics", "accuracy"]
    printed = here(
        "evaluate", "--samples", tmp_path / "samples", *command, f"data.root={tmp_path}", "--out", tmp_path / "table"
    )
    assert f"note: path={tmp_path / 'real'}: no classes, as 1 file (stray.png) beside the subfolders" in printed
    assert results.read(tmp_path / "table")[0]["metrics"]["accuracy"] > 0.95


def test_classes_that_nobody_knows(here, tmp_path):
    """Of an earlier sample.py, in another number than those of the reference: no accuracy by its names."""
    folder = tmp_path / "samples"
    write_folder(folder / "images", datasets.build("digits", None, {}).images[:20])
    (folder / "sampling.json").write_text('{"image_shape": [1, 8, 8], "labels": null, "num_classes": 5}')
    command = ["evaluate", "--samples", folder, "--reference", "digits", "--feature_extractor", "digits", "--no_control"]
    here(*command, "--metrics", "accuracy", f"data.root={tmp_path}")
    assert results.read(folder / "evaluation")[0]["metrics"] == {}


@pytest.mark.parametrize("others", [False, True])
def test_labels_beside_prompts_count(here, tmp_path, others):
    """Where their classes, which sampling.json names, are those of the reference."""
    data, folder = datasets.build("digits", None, {}), tmp_path / "samples"
    write_folder(folder / "images", torch.stack([data.images[data.labels == label][:20] for label in (3, 5)], 1).flatten(0, 1))
    names = [f"{name} of others" for name in data.class_names] if others else list(data.class_names)
    note = {"image_shape": [1, 8, 8], "labels": [3, 5], "num_classes": None, "class_names": names}
    (folder / "sampling.json").write_text(json.dumps(note))
    command = ["evaluate", "--samples", folder, "--reference", "digits", "--feature_extractor", "digits", "--no_control"]
    here(*command, "--metrics", "accuracy", f"data.root={tmp_path}")
    (row,) = results.read(folder / "evaluation")
    assert row["metrics"] == {} if others else row["metrics"]["accuracy"] > 0.9


def test_a_folder_elsewhere_is_not_taken(error, tmp_path, monkeypatch):
    """Such as one of the same name in the data root."""
    (tmp_path / "cwd").mkdir()
    write_folder(tmp_path / "samples", noisy_digits(12))
    monkeypatch.setenv("FLOW_DATA", str(tmp_path))
    monkeypatch.chdir(tmp_path / "cwd")
    line = error("evaluate", "--samples", "samples", "--reference", "digits", "--feature_extractor", "digits")
    assert "--samples samples: there is no such folder" in line


def test_a_file_is_not_a_folder(error, tmp_path):
    """As samples.npz, which sample.py --npz writes beside the images."""
    command = ["evaluate", "--reference", "digits", "--feature_extractor", "digits", "--samples"]
    (tmp_path / "samples.npz").touch()
    line = error(*command, tmp_path / "samples.npz")
    assert line == f"error: --samples {tmp_path / 'samples.npz'}: is a file; name a folder of images"
    (tmp_path / "sampling.json").touch()
    assert f"is a file; its images are in {tmp_path}; name that folder" in error(*command, tmp_path / "samples.npz")


def test_the_current_folder_has_its_name(here, tmp_path, monkeypatch):
    samples = write_folder(tmp_path / "samples", noisy_digits(12))
    monkeypatch.chdir(samples)
    command = ["evaluate", "--samples", ".", "--reference", "digits", "--feature_extractor", "digits", "--no_control"]
    here(*command, "--metrics", "prc", f"data.root={tmp_path}")
    assert [row["weights"] for row in results.read(tmp_path / "samples_evaluation")] == ["samples"]


def test_folders_refuse_flags_of_sampling(error, tmp_path):
    line = error("evaluate", "--samples", tmp_path, "--reference", "digits", "--n_samples", 100)
    assert "--n_samples: does not go with --samples" in line
    command = ["evaluate", "--samples", tmp_path, "--reference", "digits"]
    assert "--methods: does not go" in error(*command, "--methods", "heun")
    assert "train.steps: does not go with --samples" in error(*command, "train.steps=5")
    assert "is the folder of the samples; name real images" in error("evaluate", "--samples", tmp_path, "--reference", tmp_path)


def test_wide_images_have_a_wide_reference(error, tmp_path):
    """A folder of images that are not square is not cropped."""
    wide = torch.randint(0, 256, (30, 1, 8, 12), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    a, b = (write_folder(tmp_path / name, images) for name, images in (("a", wide[:15]), ("b", wide[15:])))
    line = error("evaluate", "--samples", a, "--reference", b, "--feature_extractor", "digits", f"data.root={tmp_path}")
    assert "--feature_extractor digits: the extractor takes 8x8 images, not 8x12" in line
    assert line.endswith("; use --feature_extractor inception-v3-compat")


def test_extractors_for_small_images_are_named(error, tmp_path):
    small = write_folder(tmp_path / "small", torch.zeros(3, 3, 16, 16, dtype=torch.uint8))
    line = error("evaluate", "--samples", small, "--reference", small.parent, "--feature_extractor", "cifar10")
    assert "--feature_extractor cifar10: the extractor takes 32x32 images, not 16x16" in line
    assert line.endswith("; use --feature_extractor digits or inception-v3-compat")
