"""Evaluation: the numbers are torch-fidelity's, whatever the number of processes, and the table tells the truth."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch_fidelity
from conftest import run_script, succeed
from PIL import Image

import datasets
from flow.engine.generate import SamplerSettings
from flow.evaluation import metrics, plots, reference, table
from flow.evaluation.features import INCEPTION, Extractor, FeatureSet, merge

CPU = torch.device("cpu")


def write_folder(folder, images: torch.Tensor):
    folder.mkdir(parents=True)
    for k, image in enumerate(images):
        Image.fromarray(image.permute(1, 2, 0).squeeze(-1).numpy()).save(folder / f"{k:04d}.png")
    return folder


def feature_set(images: torch.Tensor, extractor: Extractor) -> FeatureSet:
    features = FeatureSet()
    for first in range(0, len(images), 100):
        part = images[first : first + 100]
        features.add(extractor.layer, range(first, first + len(part)), extractor(part))
    return features


def noisy_digits(n: int, sigma: float = 30.0) -> torch.Tensor:
    images = datasets.build("digits", None, {}).images[:n].float()
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(1))
    return (images + sigma * noise).clamp(0, 255).to(torch.uint8)


@pytest.fixture(scope="module")
def extractor() -> Extractor:
    return Extractor("digits", None, None, CPU)


@pytest.fixture(scope="module")
def real(extractor) -> reference.Reference:
    return reference.from_features("digits", "x", feature_set(noisy_digits(1797, 0), extractor), extractor.layer)


def test_command_equals_torch_fidelity_on_the_same_files(tmp_path):
    """`evaluate.py --samples DIR --reference DIR` against `torch_fidelity.calculate_metrics` on both folders."""
    samples = write_folder(tmp_path / "samples", noisy_digits(1200))
    originals = write_folder(tmp_path / "real", noisy_digits(1797, 0))
    succeed(
        "evaluate.py", "--samples", samples, "--reference", originals, "--feature_extractor", "digits", f"data.root={tmp_path}"
    )
    ours = json.loads((samples / "evaluation" / "results.jsonl").read_text())["metrics"]
    theirs = torch_fidelity.calculate_metrics(
        input1=str(samples), input2=str(originals), feature_extractor="digits", cuda=False, fid=True, kid=True, prc=True,
        kid_subset_size=1000, verbose=False, save_cpu_ram=True, cache=False,
    )  # fmt: skip
    assert ours["FD-digits"] == pytest.approx(theirs["frechet_inception_distance"], rel=1e-4)
    assert ours["KD-digits"] == pytest.approx(theirs["kernel_inception_distance_mean"], rel=1e-4)
    assert ours["precision"] == pytest.approx(theirs["precision"], rel=1e-4)
    assert ours["recall"] == pytest.approx(theirs["recall"], rel=1e-4)


def test_a_set_is_at_distance_zero_from_itself(extractor, real):
    found = metrics.evaluate(extractor, feature_set(noisy_digits(1797, 0), extractor), real, None, ["fid", "kid", "prc"])
    assert abs(found["FD-digits"]) < 1e-6
    assert found["precision"] == found["recall"] == 1


def test_frechet_distance_of_gaussians_has_the_closed_form():
    """Also for singular covariances, and for more features than images."""
    mu = np.array([1.0, 2.0, 0.0])
    a, b = np.diag([4.0, 1.0, 0.0]), np.diag([1.0, 1.0, 9.0])
    assert metrics.frechet_distance(mu, a, mu * 0, b) == pytest.approx(5 + 1 + 9)
    few = np.random.default_rng(0).normal(size=(20, 200))
    sigma = np.cov(few, rowvar=False)
    assert abs(metrics.frechet_distance(few.mean(0), sigma, few.mean(0), sigma)) < 1e-6


def test_distance_grows_with_noise_and_accuracy_falls(extractor, real):
    labels = datasets.build("digits", None, {}).labels.numpy()
    found = [
        metrics.evaluate(extractor, feature_set(noisy_digits(1797, s), extractor), real, labels, ["fid", "accuracy"])
        for s in (0, 30, 90)
    ]
    assert found[0]["FD-digits"] < found[1]["FD-digits"] < found[2]["FD-digits"]
    assert found[0]["accuracy"] > 0.99 and found[2]["accuracy"] < 0.9


def test_merging_processes_changes_nothing(extractor):
    images = noisy_digits(300)
    whole = feature_set(images, extractor)
    parts = [FeatureSet(), FeatureSet()]
    for number, first in enumerate(range(0, 300, 100)):
        parts[number % 2].add(extractor.layer, range(first, first + 100), extractor(images[first : first + 100]))
    merged = merge(parts)
    assert torch.equal(merged.matrix("64"), whole.matrix("64"))  # in the order of the images
    assert np.allclose(merged.sigma, whole.sigma, rtol=1e-12)
    assert np.allclose(whole.sigma, np.cov(whole.matrix("64").double().numpy(), rowvar=False), rtol=1e-9, atol=1e-12)


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory, tiny_run):
    out = tmp_path_factory.mktemp("evaluation")
    command = ["evaluate.py", "--weights", tiny_run, "--feature_extractor", "digits", "--n_samples", "60", "--bspp", "16"]
    command += ["--methods", "euler", "heun", "--sampling_steps", "1", "3", "--repeats", "2", f"data.root={out / 'data'}"]
    succeed(*command, "--out", out / "one")
    return command, out


def test_two_processes_find_the_same_numbers(evaluated):
    command, out = evaluated
    succeed(*command, "--out", out / "two", processes=2)
    one, two = table.read_rows(out / "one"), table.read_rows(out / "two")
    assert len(one) == len(two) == 8
    for a, b in zip(one, two, strict=True):
        assert a["NFE"] == b["NFE"]
        assert b["metrics"] == pytest.approx(a["metrics"], rel=1e-6)


def test_table_files_and_finished_rows(evaluated):
    command, out = evaluated
    folder = out / "one"
    assert {p.name for p in folder.iterdir()} == {"results.jsonl", "results.csv", "results.md", "nfe.png"}
    rows = table.read_rows(folder)
    assert [(r["method"], r["steps"], r["NFE"]) for r in rows[::2]] == [
        ("euler", 1, 1), ("euler", 3, 3), ("heun", 1, 1), ("heun", 3, 5),
    ]  # fmt: skip
    assert [r["first"] for r in rows[:2]] == [0, 60]  # repeats are other images, not the same ones again
    assert rows[0]["metrics"]["FD-digits"] != rows[1]["metrics"]["FD-digits"]
    text = (folder / "results.md").read_text()
    assert "FD-digits" in text and "FID" not in text and "±" in text
    before = (folder / "results.jsonl").read_bytes()
    again = succeed(*command, "--out", folder)
    assert (folder / "results.jsonl").read_bytes() == before
    assert "| euler" in again.stdout


def test_aggregate_is_the_mean_and_spread_of_the_ranges():
    common = {"weights": "w", "method": "euler", "steps": 2, "NFE": 2, "forwards": 2, "guidance_scale": None, "n": 9}
    rows = [{**common, "first": i, "identity": {}, "metrics": {"FID": v}, "seconds": 1.0} for i, v in enumerate((3.0, 5.0))]
    (entry,) = table.aggregate(rows)
    assert entry["metrics"]["FID"] == pytest.approx((4.0, math.sqrt(2)))
    assert entry["ranges"] == 2


def test_repeats_of_an_adaptive_method_are_one_row(tmp_path):
    """Its NFE is measured: every repeat has its own, and the table their mean and spread."""
    row = {"weights": "w", "method": "dopri5", "steps": None, "guidance_scale": 2.0, "n": 9, "identity": {"seed": 1}}
    for first, nfe in ((0, 72), (9, 74), (18, 79)):
        cost = {"NFE": nfe, "forwards": 2 * nfe, "metrics": {"FID": nfe / 10}, "seconds": 1.0}
        table.append_row(tmp_path, {**row, "first": first, **cost, "asked": ["fid"]})
    assert table.has(tmp_path, {**row, "first": 9, "asked": ["fid"]})  # what is measured is no part of the question
    rows = table.read_rows(tmp_path)
    (entry,) = table.aggregate(rows)
    assert (entry["ranges"], entry["NFE"], entry["forwards"]) == (3, 75, 150)
    assert entry["metrics"]["FID"] == pytest.approx((7.5, 0.36056), abs=1e-5)
    assert "| 75 ± 3.6 | 150 ± 7.2 |" in table.write(tmp_path, rows)
    assert "NFE,NFE_std,forwards,forwards_std" in (tmp_path / "results.csv").read_text()


def test_results_cut_off_by_a_crash_are_read_up_to_there(tmp_path):
    row = {"weights": "a", "n": 9, "identity": {}, "metrics": {}, "seconds": 1.0, "asked": ["fid"]}
    table.append_row(tmp_path, row)
    with open(tmp_path / "results.jsonl", "a") as file:
        file.write('{"weights": "b", "met')
    assert [r["weights"] for r in table.read_rows(tmp_path)] == ["a"]
    assert table.has(tmp_path, row)
    assert not table.has(tmp_path, {**row, "asked": ["fid", "kid"]})


def test_plot_is_drawn_only_where_there_is_a_line(tmp_path):
    entry = {
        "weights": "w",
        "captions": None,
        "method": "euler",
        "guidance_scale": 1.0,
        "NFE": 2,
        "metrics": {"FID": (4.0, math.nan)},
    }
    plots.distance_against_nfe(tmp_path / "one.png", [entry])
    assert not (tmp_path / "one.png").exists()
    plots.distance_against_nfe(tmp_path / "two.png", [entry, {**entry, "NFE": 4}])
    assert Image.open(tmp_path / "two.png").width > 400


def test_npz_reference_serves_the_distance_alone(tmp_path, extractor, real):
    np.savez(tmp_path / "stats.npz", mu=real.mu, sigma=real.sigma)
    loaded = reference.from_npz(tmp_path / "stats.npz", extractor, 64)
    samples = feature_set(noisy_digits(500), extractor)
    found = metrics.evaluate(extractor, samples, loaded, None, metrics.METRICS)
    expected = metrics.evaluate(extractor, samples, real, None, ["fid"])
    assert found == pytest.approx(expected)


def test_only_inception_2048_is_called_fid():
    names = {}
    for name, layer in ((INCEPTION, "2048"), (INCEPTION, "768"), ("mnist", "64")):
        blank = Extractor.__new__(Extractor)
        blank.name, blank.layer = name, layer
        names[name, layer] = blank.distance_name
    assert list(names.values()) == ["FID", "FD-inception-768", "FD-mnist"]


@pytest.mark.slow
def test_inception_768_gives_a_number_on_cifar10(tmp_path, real_data):
    """Weights that end at layer 768, and the same number as torch-fidelity."""
    weights = real_data / "inception-768.pth"
    data = datasets.build("cifar10", real_data, {"train": False})
    a, b = (write_folder(tmp_path / str(i), data.images[200 * i : 200 * i + 200]) for i in range(2))
    result = run_script(
        "evaluate.py", "--samples", a, "--reference", b, "--feature_layer", "768", "--feature_weights", weights, "--metrics",
        "fid", f"data.root={tmp_path}", timeout=600, FLOW_NUM_THREADS="2",
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    ours = json.loads((a / "evaluation" / "results.jsonl").read_text())["metrics"]["FD-inception-768"]
    theirs = torch_fidelity.calculate_metrics(
        input1=str(a), input2=str(b), cuda=False, fid=True, feature_layer_fid="768", verbose=False, cache=False,
        feature_extractor_weights_path=str(weights),
    )  # fmt: skip
    assert ours == pytest.approx(theirs["frechet_inception_distance"], rel=1e-4)


def test_rows_of_other_solver_options_are_other_rows():
    """A stochastic row must not be taken for one of another noise scale, nor a tuned grid for the uniform one."""
    plain = SamplerSettings("euler_maruyama", 5)
    assert plain.solver == "euler_maruyama"
    assert replace(plain, options=(("noise_scale", 0.5),)).solver == "euler_maruyama, noise_scale=0.5"
    assert SamplerSettings("ab2", 5, grid="tuned", times=(0.0, 1.0)).solver == "ab2, tuned grid"
