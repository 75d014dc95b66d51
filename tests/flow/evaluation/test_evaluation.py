"""Evaluation: the numbers are torch-fidelity's, whatever the number of processes, and the table tells the truth."""

import csv
import json
import math
from contextlib import ExitStack
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch_fidelity
from conftest import run_here, run_script
from PIL import Image
from torch_fidelity.defaults import DEFAULTS
from torch_fidelity.feature_extractor_base import FeatureExtractorBase
from torch_fidelity.metric_isc import isc_features_to_metric
from torch_fidelity.registry import FEATURE_EXTRACTORS_REGISTRY

import datasets
from flow.evaluation import control, metrics, plots, reference, snapshots, table
from flow.evaluation.classifiers import weights_file
from flow.evaluation.comparison import Comparison
from flow.evaluation.features import INCEPTION, BlockMoments, Extractor, FeatureSet, merge, merge_blocks
from flow.evaluation.frechet import frechet_distance
from flow.noise import generator
from flow.runtime import distributed
from flow.sampling.conditions import conditions_by_frequency, labels_by_frequency
from flow.sampling.settings import SamplerSettings

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


def test_metrics_equal_torch_fidelity(tmp_path, here, monkeypatch):
    """`evaluate.py --samples DIR --reference DIR` against `torch_fidelity.calculate_metrics` on both folders."""
    ours = {"kid_subsets": metrics.KID_SUBSETS, "kid_subset_size": metrics.KID_SUBSET_SIZE}
    assert ours.items() <= DEFAULTS.items()
    monkeypatch.setattr(metrics, "KID_SUBSET_SIZE", 100)  # which takes a hundredth of the time
    samples = write_folder(tmp_path / "samples", noisy_digits(400))
    originals = write_folder(tmp_path / "real", noisy_digits(600, 0))
    here(
        "evaluate", "--samples", samples, "--reference", originals, "--feature_extractor", "digits", f"data.root={tmp_path}",
        "--metrics", "fid", "kid", "prc", "--no_control",
    )  # fmt: skip
    ours = json.loads((tmp_path / "samples_evaluation/results.jsonl").read_text())["metrics"]
    theirs = torch_fidelity.calculate_metrics(
        input1=str(samples), input2=str(originals), feature_extractor="digits", cuda=False, fid=True, kid=True, prc=True,
        kid_subset_size=100, verbose=False, save_cpu_ram=True, cache=False,
    )  # fmt: skip
    assert ours["FD-digits"] == pytest.approx(theirs["frechet_inception_distance"], rel=1e-4)
    assert ours["KD-digits"] == pytest.approx(theirs["kernel_inception_distance_mean"], rel=1e-4)
    assert ours["precision"] == pytest.approx(theirs["precision"], rel=1e-4)
    assert ours["recall"] == pytest.approx(theirs["recall"], rel=1e-4)


def test_a_set_is_at_distance_zero_from_itself(extractor, real):
    same = Comparison(extractor, feature_set(noisy_digits(1797, 0), extractor), real)
    values = metrics.evaluate(same, ["fid", "prc"])
    assert abs(values["FD-digits"]) < 1e-6
    assert values["precision"] == values["recall"] == 1


def test_frechet_distance_of_gaussians():
    """Also for singular covariances, and for more features than images."""
    mu = np.array([1.0, 2.0, 0.0])
    a, b = np.diag([4.0, 1.0, 0.0]), np.diag([1.0, 1.0, 9.0])
    assert frechet_distance(mu, a, mu * 0, b) == pytest.approx(5 + 1 + 9)
    few = np.random.default_rng(0).normal(size=(20, 200))
    sigma = np.cov(few, rowvar=False)
    assert abs(frechet_distance(few.mean(0), sigma, few.mean(0), sigma)) < 1e-6


def test_distance_grows_with_noise_and_accuracy_falls(extractor, real):
    labels = datasets.build("digits", None, {}).labels.numpy()
    found = [
        metrics.evaluate(
            Comparison(extractor, feature_set(noisy_digits(1797, s), extractor), real, labels), ["fid", "accuracy"]
        )
        for s in (0, 30, 90)
    ]
    assert found[0]["FD-digits"] < found[1]["FD-digits"] < found[2]["FD-digits"]
    assert found[0]["accuracy"] > 0.99 and found[2]["accuracy"] < 0.9


@pytest.mark.parametrize(
    ("names", "known"),
    [
        ("", True), ("0 1 2 3 4 5 6 7 8 9", True), ("one two three four five six seven eight nine ten", False), ("3 7", False),
        ("0,1,2,3 - three,4,5,6,7 - seven,8,9", True), ("T-shirt/top,1,2,3,4,5,6,7,8,9", False),
    ],
)  # fmt: skip
def test_accuracy_needs_the_same_classes(extractor, real, names, known):
    """Those of the classifier, as MNIST writes them, too; a reference without classes says nothing against them."""
    data = datasets.build("digits", None, {})
    like_ours = replace(real, class_names=tuple(names.split("," if "," in names else None)))
    c = Comparison(extractor, feature_set(data.images[:100], extractor), like_ours, data.labels[:100].numpy())
    assert list(metrics.evaluate(c, ["accuracy"])) == ["accuracy"] * known


def test_merging_processes_changes_nothing(extractor):
    images = noisy_digits(300)
    whole = feature_set(images, extractor)
    parts = [FeatureSet(), FeatureSet()]
    for number, first in enumerate(range(0, 300, 100)):
        parts[number % 2].add(extractor.layer, range(first, first + 100), extractor(images[first : first + 100]))
    merged = merge(parts)
    assert torch.equal(merged.matrix("64"), whole.matrix("64"))  # in the order of the images
    assert np.array_equal(merged.sigma, whole.sigma) and np.array_equal(merged.mu, whole.mu)
    assert np.allclose(whole.sigma, np.cov(whole.matrix("64").double().numpy(), rowvar=False), rtol=1e-9, atol=1e-12)


def test_moments_of_blocks_equal_the_features(extractor):
    """Also of two processes, and the standard error is about that of the features."""
    images = noisy_digits(1797)
    whole, parts = feature_set(images, extractor), [BlockMoments(), BlockMoments()]
    for number, first in enumerate(range(0, 1797, 100)):
        batch = images[first : first + 100]
        parts[number % 2].add(extractor.layer, range(first, first + len(batch)), extractor(batch))
    for part in parts:
        part.flush()
    merged = merge_blocks(parts)
    assert merged.n == 1797
    assert np.allclose(merged.mu, whole.mu, rtol=1e-8) and np.allclose(merged.sigma, whole.sigma, rtol=1e-8, atol=1e-8)
    real = reference.from_features("digits", "x", feature_set(noisy_digits(1797, 0), extractor), extractor.layer)
    blocks, rows = (Comparison(extractor, samples, real) for samples in (merged, whole))
    a, b = (metrics.evaluate(c, ["fid"])["FD-digits"] for c in (blocks, rows))
    assert a == pytest.approx(b, rel=1e-8)
    assert blocks.standard_errors["FD-digits"] == pytest.approx(rows.standard_errors["FD-digits"], rel=0.4)
    merged.bad = [117]
    with pytest.raises(ValueError, match=r"of 1 of 1797 images of the samples are not finite .* the first is image 117"):
        metrics.evaluate(blocks, ["fid"])


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory, tiny_run):
    out = tmp_path_factory.mktemp("evaluation")
    command = ["evaluate", "--weights", tiny_run, "--feature_extractor", "digits", "--n_samples", "60", "--bspp", "16"]
    command += ["--metrics", "fid", "accuracy", "prc", "density_coverage", "memorization", "--methods", "euler", "heun"]
    command += ["--sampling_steps", "1", "3", "--repeats", "2", f"data.root={out / 'data'}"]
    printed = run_here(*command, "--out", out / "one")
    assert "60 images (samples) are too few for a Frechet distance of 64 features" in printed
    return command, out


def test_two_processes_find_the_same_numbers(group, evaluated):
    """Also those of the reference, which the second run computes anew."""
    command, out = evaluated
    of_heun = ["--methods", "heun", "--sampling_steps", "3", "--repeats", "1"]
    group(*command[:-1], f"data.root={out / 'other'}", *of_heun, "--out", out / "two")
    two = table.read_rows(out / "two")
    settings = [(row["method"], row["steps"], row["first"]) for row in two]
    one = [row for row in table.read_rows(out / "one") if (row["method"], row["steps"], row["first"]) in settings]
    assert settings == [(None, None, 0), ("heun", 3, 0)]
    for a, b in zip(one, two, strict=True):
        assert a.get("NFE") == b.get("NFE")
        assert b["metrics"] == pytest.approx(a["metrics"], rel=1e-6)
        assert b["standard_errors"] == pytest.approx(a["standard_errors"], rel=1e-6)
        assert set(a["metrics"]) - set(a["standard_errors"]) == {"FD-digits"}  # of fewer images than features


@pytest.mark.parametrize(
    ("n", "names", "rel"),
    [(300, ["fid", "kid", "prc", "density_coverage"], 0), pytest.param(8300, ["fid"], 1e-8, marks=pytest.mark.slow)],
    ids=["features", "moments"],
)
def test_two_processes_measure_a_folder(group, here, tmp_path, n, names, rel):
    """The images being the same, so is every number, to the bit; moments in the place of many features are summed in another
    order."""
    samples = write_folder(tmp_path / "samples", noisy_digits(1797).repeat(5, 1, 1, 1)[:n])
    command = [
        "--samples",
        samples,
        "--reference",
        "digits",
        "--feature_extractor",
        "digits",
        "--metrics",
        *names,
        "--no_control",
    ]
    here("evaluate", *command, "--out", tmp_path / "one")
    group("evaluate", *command, "--out", tmp_path / "two")
    ([one], [two]) = (table.read_rows(tmp_path / name) for name in ("one", "two"))
    for key in ("metrics", "standard_errors"):
        assert one[key] and two[key] == pytest.approx(one[key], rel=rel, abs=0)


def test_table_files_and_finished_rows(evaluated, here):
    command, out = evaluated
    folder = out / "one"
    names = {"results.jsonl", "results.csv", "results.md", "nfe.png", "memorization.png"}
    assert {p.name for p in folder.iterdir()} == names
    control, *rows = table.read_rows(folder)
    assert table.is_control(control) and control["n"] == 60
    assert [(r["method"], r["steps"], r["NFE"]) for r in rows[::2]] == [
        ("euler", 1, 1), ("euler", 3, 3), ("heun", 1, 1), ("heun", 3, 5),
    ]  # fmt: skip
    assert [r["first"] for r in rows[:2]] == [0, 60]  # repeats are other images, not the same ones again
    assert rows[0]["metrics"]["FD-digits"] != rows[1]["metrics"]["FD-digits"]
    text = (folder / "results.md").read_text()
    assert "FD-digits" in text and "FID" not in text and " (sd " in text
    assert "real (half against half)" in text and "real (half against half)" in (folder / "results.csv").read_text()
    before = (folder / "results.jsonl").read_bytes()
    again = here(*command, "--out", folder)
    assert (folder / "results.jsonl").read_bytes() == before
    assert "| euler" in again


def test_aggregate_mean_and_spread():
    """The aggregate is the mean and spread of the ranges."""
    common = {"weights": "w", "method": "euler", "steps": 2, "NFE": 2, "forwards": 2, "guidance_scale": None, "n": 9}
    rows = [{**common, "first": i, "identity": {}, "metrics": {"FID": v}, "seconds": 1.0} for i, v in enumerate((3.0, 5.0))]
    (entry,) = table.aggregate(rows)
    assert entry["metrics"]["FID"][:2] == pytest.approx((4.0, math.sqrt(2)))
    assert entry["ranges"] == 2


def test_repeats_of_an_adaptive_method_are_one_row(tmp_path):
    """Its NFE is measured: every repeat has its own, and the table their mean and spread."""
    row = {"weights": "w", "method": "dopri5", "steps": None, "guidance_scale": 2.0, "n": 9, "identity": {"seed": 1}}
    for first, nfe in ((0, 72), (9, 74), (18, 79)):
        cost = {"NFE": nfe, "forwards": 2 * nfe, "metrics": {"FID": nfe / 10}, "seconds": 1.0}
        table.append_row(tmp_path, {**row, "first": first, **cost, "requested": ["fid"]})
    assert table.contains(tmp_path, {**row, "first": 9, "requested": ["fid"]})  # what is measured is no part of the question
    rows = table.read_rows(tmp_path)
    (entry,) = table.aggregate(rows)
    assert (entry["ranges"], entry["NFE"], entry["forwards"]) == (3, 75, 150)
    assert entry["metrics"]["FID"][:2] == pytest.approx((7.5, 0.36056), abs=1e-5)
    assert "| 75 (sd 3.6) | 150 (sd 7.2) |" in table.write(tmp_path, rows)
    assert "NFE,NFE_std,forwards,forwards_std" in (tmp_path / "results.csv").read_text()


def test_table_shows_intervals(tmp_path):
    """Of one range its own, of two that of their mean; none where a range does not know its error."""
    common = {
        "weights": "a",
        "method": "euler",
        "steps": 5,
        "NFE": 5,
        "forwards": 5,
        "n": 100,
        "seconds": 1.0,
        "requested": ["fid"],
    }
    rows = [
        {**common, "identity": {"seed": seed}, "first": first, "metrics": {"FID": value}, "standard_errors": errors}
        for seed, first, value, errors in (
            (0, 0, 3.0, {"FID": 0.5}), (1, 0, 3.0, {"FID": 0.3}), (1, 100, 5.0, {"FID": 0.4}), (2, 0, 3.0, {"FID": 0.3}),
            (2, 100, 5.0, {}),
        )
    ]  # fmt: skip
    for row in rows:
        table.append_row(tmp_path, row)
    intervals = [entry["metrics"]["FID"].interval for entry in table.aggregate(table.read_rows(tmp_path))]
    assert intervals == pytest.approx([1.96 * 0.5, 1.96 * 0.25, math.nan], nan_ok=True)
    text = table.write(tmp_path, rows)
    assert "3.00 ± 0.98 |" in text and "4.00 ± 0.49 (sd 1.41) |" in text and text.endswith(table.NOTE)
    with open(tmp_path / "results.csv", newline="") as file:
        assert [line["FID_interval"][:4] for line in csv.DictReader(file)] == ["0.98", "0.49", ""]


def test_cells_may_hold_bars():
    text = table.markdown([["weights", "FID"], ["a|b", "9.00"], ["c", "10.00"]])
    assert text.splitlines() == [r"| weights |   FID |", "| ------- | ----: |", r"| a\|b    |  9.00 |", "| c       | 10.00 |"]


def test_a_table_takes_the_place_of_the_one_before(tmp_path):
    """Whole: who reads while it is written reads the one before to its end."""
    row = {"weights": "a", "n": 9, "identity": {}, "seconds": 1.0, "requested": ["fid"]}
    rows = [{**row, "first": 9 * k, "metrics": {"FID": 3.0, "FID[3]": 1.0}} for k in range(2)]
    text = table.write(tmp_path, rows)
    names = ["per_class.md", "results.csv", "results.md"]
    before = [(tmp_path / name).read_text() for name in names]
    assert text == f"{before[2]}\n{before[0]}"[:-1]
    with ExitStack() as stack:
        readers = [stack.enter_context(open(tmp_path / name)) for name in names]
        table.write(tmp_path, rows[:1])
        assert [reader.read() for reader in readers] == before
    after = [(tmp_path / name).read_text() for name in names]
    assert all(a != b for a, b in zip(after, before, strict=True))
    assert sorted(path.name for path in tmp_path.iterdir()) == names


def test_plot_is_drawn_only_where_there_is_a_line(tmp_path):
    entry = {
        "weights": "w",
        "captions": None,
        "method": "euler",
        "guidance_scale": 1.0,
        "NFE": 2,
        "metrics": {"FID": table.Statistic(4.0, math.nan)},
    }
    plots.distance_against_nfe(tmp_path / "one.png", [entry])
    assert not (tmp_path / "one.png").exists()
    plots.distance_against_nfe(tmp_path / "two.png", [entry, {**entry, "NFE": 4}])
    assert Image.open(tmp_path / "two.png").width > 400
    control = {
        **entry,
        "weights": "real (test split)",
        "method": None,
        "NFE": None,
        "n": 9,
        "metrics": {"FID": table.Statistic(1.0, math.nan)},
    }
    plots.distance_against_nfe(tmp_path / "control.png", [entry, control])
    assert not (tmp_path / "control.png").exists()
    plots.distance_against_nfe(tmp_path / "control.png", [entry, {**entry, "NFE": 4}, control])
    assert (tmp_path / "control.png").read_bytes() != (tmp_path / "two.png").read_bytes()


def test_npz_reference_serves_the_distance_alone(tmp_path, extractor, real):
    np.savez(tmp_path / "stats.npz", mu=real.mu, sigma=real.sigma)
    loaded = reference.from_npz(tmp_path / "stats.npz", extractor, 64)
    samples = feature_set(noisy_digits(500), extractor)
    found = metrics.evaluate(Comparison(extractor, samples, loaded), metrics.METRICS)
    expected = metrics.evaluate(Comparison(extractor, samples, real), ["fid"])
    assert found == pytest.approx(expected)


@pytest.mark.parametrize(("name", "least"), [("digits", 0.98), ("mnist", 0.98), ("cifar10", 0.85)])
def test_classifiers_know_their_classes(request, name, least):
    """From a file under 1 MB; images of the test split, but for the digits, which have none."""
    root = None if name == "digits" else request.getfixturevalue("real_data")
    data = datasets.build(name, root, {} if name == "digits" else {"train": False})
    extractor = Extractor(name, None, None, CPU)
    logits = extractor(data.images[:500])["logits"]
    assert (logits.argmax(1) == data.labels[:500]).float().mean() > least
    assert weights_file(name).stat().st_size < 1e6


class PixelFeatures(FeatureExtractorBase):
    """An extractor that knows no classes: the pixels of the first channel."""

    def __init__(self, name: str, features_list: list[str], **unused):
        super().__init__(name, features_list)

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor]:
        return (images[:, 0].flatten(1).float() / 255,)

    @staticmethod
    def get_provided_features_list() -> tuple[str]:
        return ("64",)

    @staticmethod
    def get_default_feature_layer_for_metric(metric: str) -> str:
        return "64"

    @staticmethod
    def can_be_compiled() -> bool:
        return False

    @staticmethod
    def get_dummy_input_for_compile() -> torch.Tensor:
        return torch.zeros(1, 3, 8, 8, dtype=torch.uint8)


def test_accuracy_beside_another_extractor(here, monkeypatch, tmp_path, tiny_run):
    """By the classifier of the data set; what else has no value is named once."""
    monkeypatch.setitem(FEATURE_EXTRACTORS_REGISTRY, "pixels", PixelFeatures)
    command = ["evaluate", "--weights", tiny_run, "--n_samples", 70, "--sampling_steps", 1, 2]
    here(*command, "--feature_extractor", "digits", "--out", tmp_path / "digits")
    printed = here(
        *command, "--feature_extractor", "pixels", "--metrics", "fid", "accuracy", "isc", "--out", tmp_path / "pixels"
    )
    assert printed.count("note: no value of isc here") == 1
    own, beside = ([row for row in table.read_rows(tmp_path / name) if row.get("NFE")] for name in ("digits", "pixels"))
    assert [row["metrics"]["accuracy"] for row in beside] == [row["metrics"]["accuracy"] for row in own]
    assert all(row["metrics"]["FD-pixels"] > 0 for row in beside) and len(beside) == 2


def test_distances_of_classes(extractor, real, tmp_path):
    """Each against the images of its class; a class with too few images has none, and the table says why."""
    data = datasets.build("digits", None, {})
    labels = data.labels.numpy()
    real = replace(real, labels=labels, class_names=data.class_names)
    kept = np.sort(np.concatenate([np.flatnonzero(labels != 7), np.flatnonzero(labels == 7)[:60]]))
    samples = feature_set(noisy_digits(1797), extractor).select("64", kept)
    c = Comparison(extractor, samples, real, labels[kept])
    found = metrics.evaluate(c, ["fid", "per_class"])
    assert set(found) == set(c.standard_errors) == {"FD-digits", *(f"FD-digits[{k}]" for k in range(10) if k != 7)}
    threes = [features.matrix("64").double().numpy()[chosen == 3] for features, chosen in (
        (samples, labels[kept]), (real.feature_set, labels))]  # fmt: skip
    moments = [f(x) for x in threes for f in (lambda x: x.mean(0), lambda x: np.cov(x.T))]
    assert found["FD-digits[3]"] == pytest.approx(frechet_distance(*moments))
    row = {"weights": "w", "n": len(kept), "identity": {}, "seconds": 1.0, "requested": ["fid"], "NFE": 1, "forwards": 1}
    rows = [
        {**row, "first": i, "identity": {"i": i}, "metrics": {**found, **more}}
        for i, more in enumerate(({}, {"FD-digits[7]": 1.0}))
    ]
    printed = table.write(tmp_path, rows)
    text = (tmp_path / "per_class.md").read_text()
    assert text.strip() in printed and table.CLASS_NOTE in text and "FD-digits[3]" in text
    assert "[3]" not in (tmp_path / "results.md").read_text() and "FD-digits[3]" in (tmp_path / "results.csv").read_text()


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
        "fid", "--no_control", f"data.root={tmp_path}", timeout=600, FLOW_NUM_THREADS="2",
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    ours = json.loads((tmp_path / "0_evaluation/results.jsonl").read_text())["metrics"]["FD-inception-768"]
    theirs = torch_fidelity.calculate_metrics(
        input1=str(a), input2=str(b), cuda=False, fid=True, feature_layer_fid="768", verbose=False, cache=False,
        feature_extractor_weights_path=str(weights),
    )  # fmt: skip
    assert ours == pytest.approx(theirs["frechet_inception_distance"], rel=1e-4)


def test_rows_of_other_solver_options_are_other_rows():
    """A stochastic row must not be taken for one of another noise scale, nor a tuned grid for the uniform one."""
    plain = SamplerSettings("euler_maruyama", 5)
    assert plain.title == "euler_maruyama"
    assert replace(plain, options=(("noise_scale", 0.5),)).title == "euler_maruyama, noise_scale=0.5"
    assert SamplerSettings("ab2", 5, time_grid="optimized", times=(0.0, 1.0)).title == "ab2, optimized grid"


# ---- labels


@pytest.mark.parametrize("counts", [[9, 1], [5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949], [3, 0, 5, 1], [2, 2]])
def test_class_frequency_of_every_prefix(counts):
    """The first n samples have the classes by their frequency, for every n."""
    n = min(2 * sum(counts), 3000)
    labels = labels_by_frequency(counts, n)
    share = np.array(counts) / sum(counts)
    so_far = np.cumsum(np.eye(len(counts))[labels], axis=0)
    assert np.abs(so_far - np.arange(1, n + 1)[:, None] * share).max() < 1
    assert labels_by_frequency(counts, n // 2) == labels[: n // 2]


def test_classes_of_one_frequency_take_turns():
    assert labels_by_frequency([5000] * 10, 25) == [k % 10 for k in range(25)]
    labels, prompts = conditions_by_frequency([2, 1], 6, [["a", "A"], ["b"]])
    assert [p for _, p in sorted(zip(labels, prompts, strict=True), key=lambda pair: pair[0])] == ["a", "A", "a", "A", "b", "b"]


@pytest.fixture
def unbalanced(tmp_path):
    """A folder of digits in ten classes: nine images of each but for the eights, of which there are 19."""
    data = datasets.build("digits", None, {})
    for label in range(10):
        write_folder(tmp_path / "unbalanced" / str(label), data.images[data.labels == label][: 19 if label == 8 else 9])
    return tmp_path / "unbalanced"


def test_labels_follow_reference_frequency(here, tmp_path, tiny_run, unbalanced, monkeypatch):
    """Over the repeats together; labels of the command line take turns."""
    drawn = []
    generate = snapshots.generate

    def recorded(*args):
        for result in generate(*args):
            drawn.extend(result.labels.tolist())
            yield result

    monkeypatch.setattr(snapshots, "generate", recorded)
    command = ["evaluate", "--weights", tiny_run, "--feature_extractor", "digits", "--sampling_steps", 1, "--bspp", 32]
    command += [
        "--reference",
        unbalanced,
        "--n_samples",
        50,
        "--repeats",
        2,
        f"data.root={tmp_path}",
        "--out",
        tmp_path / "out",
    ]
    here(*command)
    assert [drawn.count(label) for label in range(10)] == [9, 9, 9, 9, 9, 9, 9, 9, 19, 9]
    drawn.clear()
    here(*command, "--labels", 8, 1)
    assert drawn == [8, 1] * 50
    rows = [row for row in table.read_rows(tmp_path / "out") if not table.is_control(row)]
    assert len(rows) == 4 and {str(row["identity"]["labels"])[:12] for row in rows} == {"by frequency", "[8, 1]"}


def test_a_perfect_model_of_an_unbalanced_set_is_near(extractor):
    """Real images with labels by frequency are as near as chance allows; in turn they are far away."""
    data = datasets.build("digits", None, {})
    ones, eights = [data.images[data.labels == label] for label in (1, 8)]
    counts = [90, 10]
    real = torch.cat([ones[:90], eights[:10]])
    held_out = [ones[90:], eights[10:]]

    def distance(labels) -> float:
        used = [iter(images) for images in held_out]
        samples = torch.stack([next(used[label]) for label in labels])
        stats = [feature_set(images, extractor) for images in (samples, real)]
        return frechet_distance(stats[0].mu, stats[0].sigma, stats[1].mu, stats[1].sigma)

    assert 4 * distance(labels_by_frequency(counts, 90)) < distance([k % 2 for k in range(90)])


def test_classes_take_turns_without_data(here, tmp_path, tiny_run, extractor, real):
    """Without data to count, classes take turns."""
    np.savez(tmp_path / "stats.npz", mu=real.mu, sigma=real.sigma)
    command = ["evaluate", "--weights", tiny_run, "--feature_extractor", "digits", "--sampling_steps", 1, "--n_samples", 70]
    command += ["--reference", tmp_path / "stats.npz", "--out", tmp_path / "out"]
    assert "warning" not in here(*command)  # the digits of the training are here
    printed = here(*command, "data.name=folder", f"data.args={{path: {tmp_path / 'none'}}}")
    assert "warning: the classes take turns" in printed and "no row of real images" in printed


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
    (row,) = table.read_rows(folder / "evaluation")
    assert row["n"] == 69 and row["metrics"]["accuracy"] > 0.9
    (folder / "images/0004.png").rename(folder / "images/four.png")
    assert f"--samples {folder}: not a file of sample.py" in error(*command)


def test_points_are_no_folder_of_images(here, error, points_flow, tmp_path):
    folder = tmp_path / "samples"
    here("sample", "--weights", points_flow("moons", 1), "--n_samples", 2, "--sampling_steps", 1, "--save_dir", folder)
    line = error("evaluate", "--samples", folder, "--reference", "toys:moons")
    assert f"--samples {folder}: sampling.json cannot be used: it is of points" in line and "with --weights" in line


# ---- metrics in blocks, and what is no number


def inception(n: int) -> tuple[Extractor, FeatureSet]:
    """What Inception would give of n images, at random, with eight features."""
    blank = Extractor.__new__(Extractor)
    blank.name, blank.layer, blank.isc_layer, blank.classifier = INCEPTION, "2048", "logits_unbiased", None
    features, generator = FeatureSet(), torch.Generator().manual_seed(0)
    outputs = {name: torch.randn(n, 8, generator=generator) for name in ("2048", "logits_unbiased")}
    features.add("2048", range(n), outputs)
    return blank, features


@pytest.mark.parametrize("n", [9, 10, 25])
def test_the_inception_score_is_a_number_or_absent(n):
    extractor, features = inception(n)
    real = reference.from_features("x", "x", inception(50)[1], "2048")
    found = metrics.evaluate(Comparison(extractor, features, real), metrics.DEFAULT)
    assert ("IS" in found) == (n >= 10) and all(math.isfinite(value) for value in found.values())
    if n >= 10:
        assert found["IS"] == isc_features_to_metric(features.matrix("logits_unbiased"))["inception_score_mean"]


def test_features_that_are_not_finite_are_refused(extractor, real):
    features = feature_set(noisy_digits(200), extractor)
    features.rows["64"][1][17, 3] = np.nan
    with pytest.raises(ValueError, match=r"of 1 of 200 images of the samples are not finite .* the first is image 117"):
        metrics.evaluate(Comparison(extractor, features, real), ["fid"])
    with pytest.raises(ValueError, match="of 1 of 200 images of mine are not finite"):
        reference.from_features("mine", "x", features, "64")


def damaged_statistics(kind: str, mu: np.ndarray, sigma: np.ndarray, path) -> None:
    values = {"mu": mu, "sigma": sigma}
    if kind == "nan":
        values["mu"] = np.where(np.arange(len(mu)) == 3, np.nan, mu)
    elif kind == "infinite":
        values["sigma"] = np.full_like(sigma, np.inf)
    elif kind == "not symmetric":
        values["sigma"] = sigma + np.triu(np.ones_like(sigma), 1)
    elif kind == "indefinite":
        values["sigma"] = sigma - np.eye(len(mu))
    elif kind == "no sigma":
        del values["sigma"]
    elif kind == "text":
        values["mu"] = np.array(["a"] * len(mu))
    elif kind == "complex":
        values["sigma"] = sigma * 1j
    elif kind == "pickled":
        values["mu"] = np.array([None] * len(mu))
    np.savez(path, **values)
    whole = path.read_bytes()
    if kind == "cut":
        path.write_bytes(whole[: len(whole) // 2])
    elif kind == "empty":
        path.write_bytes(b"")
    elif kind == "bad CRC":
        path.write_bytes(whole[:5000] + bytes([whole[5000] ^ 1]) + whole[5001:])
    elif kind == "npy":
        with open(path, "wb") as file:
            np.save(file, mu)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("nan", "mu holds values that are not finite"), ("infinite", "sigma holds values that are not finite"),
        ("not symmetric", "sigma is not symmetric"), ("indefinite", "sigma has the eigenvalue -"),
        ("no sigma", "not an npz file with mu and sigma"), ("text", "mu holds <U1, not real numbers"),
        ("complex", "sigma holds complex128, not real numbers"), ("pickled", "not an npz file"), ("cut", "not an npz file"),
        ("empty", "not an npz file"), ("bad CRC", "Bad CRC-32"), ("npy", "not an npz file"), ("absent", "No such file"),
    ],
)  # fmt: skip
def test_damaged_statistics_are_named(kind, message, error, tmp_path, tiny_run, real):
    path = tmp_path / "stats.npz"
    if kind != "absent":
        damaged_statistics(kind, real.mu, real.sigma, path)
    command = ["--weights", tiny_run, "--n_samples", 4, "--sampling_steps", 1, "--feature_extractor", "digits"]
    line = error("evaluate", *command, "--reference", path, "--out", tmp_path / "out")
    assert str(path) in line and message in line


def test_mutated_statistics_are_refused_or_the_same(extractor, real, tmp_path):
    """No flipped byte and no cut changes a number without a word."""
    path = tmp_path / "stats.npz"
    np.savez(path, mu=real.mu, sigma=real.sigma)
    whole, draws, refused = path.read_bytes(), generator("mutations"), 0
    for k in range(300):
        mutated = bytearray(whole)
        for position in draws.integers(len(whole), size=1 + k % 3):
            mutated[position] ^= 1 << int(draws.integers(8))
        if k % 5 == 0:
            del mutated[int(draws.integers(len(whole))) :]
        path.write_bytes(mutated)
        try:
            loaded = reference.from_npz(path, extractor, 64)
        except ValueError as error:
            assert str(path) in str(error)
            refused += 1
        else:
            assert np.array_equal(loaded.mu, real.mu) and np.array_equal(loaded.sigma, real.sigma)
    assert refused > 200


# ---- the reference and its cache


def test_damaged_caches_are_named_and_computed_again(here, tmp_path, tiny_run):
    command = ["evaluate", "--weights", tiny_run, "--feature_extractor", "digits", "--sampling_steps", 1, "--n_samples", 70]
    command += [f"data.root={tmp_path}", "--no_control"]

    def distance(name: str) -> tuple[str, float]:
        printed = here(*command, "--out", tmp_path / name)
        (row,) = table.read_rows(tmp_path / name)
        return printed, row["metrics"]["FD-digits"]

    _, expected = distance("whole")
    (cache,) = (tmp_path / "features").iterdir()
    whole = cache.read_bytes()
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 1
    cache.write_bytes(flipped)
    printed, value = distance("flipped")
    assert f"warning: {cache}: damaged cache" in printed and value == expected
    assert "warning" not in distance("again")[0]
    with np.load(cache) as file:
        arrays = dict(file)
    np.savez(cache, **{**arrays, "64": arrays["64"][:-100], "logits": arrays["logits"][:-100]})
    printed, value = distance("cut")
    assert f"warning: {cache}: damaged cache" in printed and value == expected


def test_real_row_without_splits(evaluated, extractor):
    """Two random halves of the reference, of which the first has no more images than the rows have samples."""
    row_of_real = next(row for row in table.read_rows(evaluated[1] / "one") if table.is_control(row))
    data = datasets.build("digits", None, {})
    order = generator("control").permutation(len(data))
    chosen = control.choose_by_frequency(order[:898].tolist(), data.labels, data.labels[order[898:]], 60)
    a, b = (feature_set(data.images[part], extractor) for part in (chosen, order[898:]))
    expected = frechet_distance(a.mu, a.sigma, b.mu, b.sigma)
    assert row_of_real["metrics"]["FD-digits"] == pytest.approx(expected, rel=1e-6)
    assert row_of_real["metrics"]["accuracy"] > 0.95


def test_other_held_out_images_are_another_row(here, tmp_path, tiny_run):
    """Of real images: the folder of the held-out ones may be made anew."""
    for name in ("train", "test"):
        here("pack_images", "--source", "digits", "--split", name, "--save_dir", tmp_path / name)
    command = ["evaluate", "--weights", tiny_run, "--feature_extractor", "digits", "--metrics", "fid", "--sampling_steps", 1]
    command += ["--n_samples", 8, f"data.root={tmp_path}", "--out", tmp_path / "out", "data.name=packed"]
    for name in ("test", "train", "test"):
        here(*command, f"data.args={{path: {tmp_path / 'train'}, held_out: {tmp_path / name}}}")
    rows = table.read_rows(tmp_path / "out")
    assert [row["weights"] for row in rows] == ["real (held-out images)", "tiny@4", "real (held-out images)"]
    assert rows[0]["metrics"] != rows[2]["metrics"]


def test_choice_by_frequency():
    """Classes are as frequent as in the reference; one that runs out is replaced, so that the number stays."""
    pool, labels = [5, 4, 3, 2, 1, 0], torch.tensor([0, 0, 0, 1, 1, 1])
    assert control.choose_by_frequency(pool, labels, torch.tensor([0, 0, 1]), 3) in ([2, 1, 5], [2, 5, 1])
    assert sorted(control.choose_by_frequency(pool, labels, torch.tensor([0, 0, 1]), 6)) == sorted(pool)
    assert control.choose_by_frequency(pool, labels, torch.tensor([0]), 4) == [2, 1, 0, 5]
    assert control.choose_by_frequency(pool, None, None, 2) == [5, 4]


def test_splits_of_a_reference_by_name(error, tmp_path, tiny_run):
    assert datasets.named_split("mnist:test") == ("mnist", {"train": False})
    assert datasets.named_split("cifar10") == ("cifar10", {}) and datasets.named_split("some/folder:x") is None
    train = {"name": "mnist", "root": None, "args": {}}
    kind, test = datasets.held_out(train)
    assert kind == "test split" and test["args"] == {"train": False}
    assert datasets.held_out(test)[0] == "train split" and datasets.held_out({**train, "name": "digits"}) is None
    command = ["--weights", tiny_run, "--n_samples", 4, "--feature_extractor", "digits", "--out", tmp_path / "out"]
    for name in ("digits:test", "mnist:validation"):
        assert f"{name}: must be NAME, NAME:train or NAME:test" in error("evaluate", *command, "--reference", name)


@pytest.mark.slow
def test_the_row_of_real_images_of_mnist(here, tmp_path, real_data):
    """Test images against training ones, and the other way round."""
    samples = write_folder(tmp_path / "samples", datasets.build("mnist", real_data, {"train": False}).images[:1000])
    for name, kind in (("mnist", "test split"), ("mnist:test", "train split")):
        out = tmp_path / kind
        here("evaluate", "--samples", samples, "--reference", name, "--feature_extractor", "mnist", "--out", out)
        control = next(row for row in table.read_rows(out) if table.is_control(row))
        assert control["weights"] == f"real ({kind})" and control["n"] == 1000
        assert 0.7 < control["metrics"]["FD-mnist"] < 1.8 and control["metrics"]["accuracy"] > 0.98


def test_one_bar_at_a_time(here, tmp_path, tiny_run, monkeypatch):
    bars = []
    progress = distributed.progress

    def recorded(*args, **kwargs):
        assert all(bar.disable for bar in bars), "the bar before is still open"
        bars.append(progress(*args, **kwargs))
        return bars[-1]

    monkeypatch.setattr(distributed, "progress", recorded)
    here(
        "evaluate", "--weights", tiny_run, "--feature_extractor", "digits", "--sampling_steps", 1, 2, "--n_samples", 70,
        "--metrics", "fid", "prc", f"data.root={tmp_path}", "--out", tmp_path / "out",
    )  # fmt: skip
    names = [bar.desc for bar in bars]
    images = [f"images of this process, row {k} of 2" for k in (1, 2)]
    assert names == ["features of the reference", "metrics", images[0], "metrics", images[1], "metrics"]
    assert [bar.n for bar in bars if bar.desc in images] == [70, 140]  # of 140: the time left is that of all rows
    assert all(bar.n == bar.total for bar in bars if bar.desc == "metrics")
