"""Copies of training images are found, new images of the same kind are not."""

import numpy as np
import pytest
import torch
from conftest import succeed
from digits_features import estimates, write_folder
from PIL import Image

import datasets
from flow.evaluation import memorization, metrics, results
from flow.evaluation.comparison import Comparison, Estimate
from flow.evaluation.features import FeatureSet, FeatureSpace
from flow.evaluation.reference import from_features


def draws(n: int, seed: int) -> torch.Tensor:
    return torch.randn(n, 6, generator=torch.Generator().manual_seed(seed))


def share(samples: torch.Tensor, training: memorization.TrainingSet) -> tuple[Estimate, Comparison]:
    features = FeatureSet()
    features.add("x", range(len(samples)), {"x": samples})
    c = Comparison(FeatureSpace("some", "x"), features, from_features("real", "", features, "x"), training=training)
    return estimates(c, "memorization")["memorization"], c


@pytest.mark.parametrize("has_held_out", [True, False])
def test_copies_are_told_from_new_images(has_held_out):
    """Also where the threshold comes from the training images alone."""
    images, data = draws(3000, 0), datasets.build("digits", None, {})
    training = memorization.training_set(data, images, draws(2000, 1) if has_held_out else None)
    new, _ = share(draws(4000, 2), training)
    copied, c = share(images[:500] + 0.01 * draws(500, 3), training)
    assert new.value == pytest.approx(0.01, abs=0.008) and copied.value == 1
    assert c.closest.ratios == sorted(c.closest.ratios) and c.closest.ratios[-1] < 0.2
    assert c.closest.training == c.closest.samples and len(c.closest.samples) == memorization.PAIRS
    mixed, c = share(torch.cat([draws(900, 4), images[:100]]), training)
    assert 0.1 <= mixed.value <= 0.13 and min(c.closest.samples) >= 900
    assert 0.009 < mixed.standard_error < 0.011


@pytest.mark.parametrize("has_held_out", [True, False])
def test_duplicates_are_no_chance(has_held_out):
    """A tenth of the training images come twice, as in collections from the web; held-out images may be among them, too."""
    images, data = draws(3000, 0), datasets.build("digits", None, {})
    held_out = torch.cat([draws(2000, 1), images[:200]]) if has_held_out else None
    training = memorization.training_set(data, torch.cat([images, images[:300]]), held_out)
    new, _ = share(draws(4000, 2), training)
    assert new.value == pytest.approx(0.01, abs=0.008) and share(images[:500].clone(), training)[0].value == 1


def test_command(here, tmp_path, tiny_run, monkeypatch):
    """Rows of a network and of real images, and a figure; digits have no held-out images."""
    monkeypatch.setattr(memorization, "PAIRS", 24)  # the figure as users see it
    out = tmp_path / "out"
    printed = here(
        "evaluate", "--weights", tiny_run, "--feature_extractor", "digits", "--sampling_steps", 1, "--n_samples", 300,
        "--metrics", "memorization", f"data.root={tmp_path}", "--out", out,
    )  # fmt: skip
    assert "digits has no held-out images" in printed
    control, row = results.read(out)
    assert control["metrics"]["memorization"] < 0.05 and row["metrics"]["memorization"] < 0.05
    assert "| 0.0" in (out / "results.md").read_text()
    with Image.open(out / "memorization.png") as figure:
        assert np.asarray(figure.convert("L")).std() > 10


def test_a_folder_of_training_images_is_copied(here, error, tmp_path):
    """With -c, which names the training set; without it the column stays empty, and can be filled later.

    What is written lies beside the folder: in it, its picture would be one of the images.
    """
    samples, out = tmp_path / "samples", tmp_path / "samples_evaluation"
    samples.mkdir()
    for k, image in enumerate(datasets.build("digits", None, {}).images[:70]):
        Image.fromarray(image[0].numpy()).save(samples / f"{k:03d}.png")
    command = ["evaluate", "--samples", samples, "--reference", "digits", "--feature_extractor", "digits"]
    command += ["--metrics", "fid", "memorization", "--no_control", f"data.root={tmp_path}"]
    assert "note: no memorization" in here(*command)
    (row,) = results.read(out)
    assert row["requested"] == ["fid"] and list(row["metrics"]) == ["FD-digits"] and not (out / "memorization.png").exists()
    assert "note: no memorization" not in here(*command, "-c", "configs/digits.yaml")
    assert results.read(out)[-1]["metrics"]["memorization"] == 1 and (out / "memorization.png").exists()
    line = error(*command, "--metrics", "memorization")
    assert "--metrics memorization: the training set of these images is not known" in line
    before = (out / "results.jsonl").read_bytes()
    for config in ([], ["-c", "configs/digits.yaml"]):
        here(*command, *config)
    assert (out / "results.jsonl").read_bytes() == before
    assert len(list(samples.iterdir())) == 70


def test_held_out_images_belong_to_the_row(here, tmp_path, packed_digits):
    """They are the threshold: with others the row is computed anew."""
    samples = write_folder(tmp_path / "samples", datasets.build("digits", None, {}).images[:70])
    command = ["evaluate", "--samples", samples, "--reference", packed_digits / "train", "--feature_extractor", "digits"]
    command += ["--metrics", "memorization", "--no_control", f"data.root={tmp_path}", "-c", "configs/digits.yaml"]
    shares = []
    for held_out in ("test", "other", "test"):
        here(
            *command, "data.name=packed", f"data.args={{path: {packed_digits / 'train'}, held_out: {packed_digits / held_out}}}"
        )
        (row,) = results.read(tmp_path / "samples_evaluation")
        shares.append(row["metrics"]["memorization"])
    assert shares[0] == shares[2] != shares[1]


def test_missing_training_set_is_named(error, tmp_path, tiny_run):
    command = ["--weights", tiny_run, "--n_samples", 4, "--feature_extractor", "digits", "--metrics", "memorization"]
    line = error(
        "evaluate", *command, "--reference", "digits", "--out", tmp_path / "out", "data.name=folder",
        f"data.args={{path: {tmp_path / 'none'}}}",
    )  # fmt: skip
    assert "--metrics memorization: " in line and "no such folder" in line


@pytest.mark.slow
def test_all_metrics_on_two_processes(tmp_path, tiny_run):
    """The same values and standard errors as on one."""
    command = ["evaluate.py", "--weights", tiny_run, "--feature_extractor", "digits", "--bspp", 128, "--sampling_steps", 1]
    command += [f"data.root={tmp_path / 'data'}", "--out"]
    for processes in (1, 2):
        several = ["--n_samples", 800, "--metrics", *metrics.METRICS]
        succeed(*command, tmp_path / str(processes), *several, processes=processes)
    one, two = (results.read(tmp_path / name) for name in "12")
    for a, b in zip(one, two, strict=True):
        assert b["metrics"] == pytest.approx(a["metrics"], rel=1e-5)  # KD is a small difference of large sums
        assert b["standard_errors"] == pytest.approx(a["standard_errors"], rel=1e-5)
        assert set(a["standard_errors"]) == set(a["metrics"])
    row = one[1]["metrics"]
    assert {"FD-digits", "FD-digits_inf", "KD-digits", "coverage", "density", "memorization", "FD-digits[3]"} <= set(row)
    assert (tmp_path / "2/memorization.png").exists() and "FD-digits[3]" in (tmp_path / "2/per_class.md").read_text()
