"""The metrics of images: torch-fidelity's numbers, of whole sets and of classes, or no number at all."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch_fidelity
from digits_features import digits_extractor, digits_reference, estimates, feature_set, noisy_digits, values, write_folder
from scipy.stats import t as student
from torch_fidelity.defaults import DEFAULTS
from torch_fidelity.feature_extractor_base import FeatureExtractorBase
from torch_fidelity.metric_isc import isc_features_to_metric
from torch_fidelity.registry import FEATURE_EXTRACTORS_REGISTRY

import datasets
from flow.evaluation import metrics, reference, results, table
from flow.evaluation.comparison import Comparison
from flow.evaluation.features import INCEPTION, FeatureSet, FeatureSpace
from flow.evaluation.frechet import frechet_distance
from flow.evaluation.intervals import NORMAL_95
from flow.evaluation.moments import Moments

extractor = pytest.fixture(digits_extractor, scope="module")
real = pytest.fixture(digits_reference, scope="module")


def test_metrics_equal_torch_fidelity(tmp_path, here, monkeypatch):
    """`evaluate.py --samples DIR --reference DIR` against `torch_fidelity.calculate_metrics` on both folders."""
    by_evaluate = {"kid_subsets": metrics.KID_SUBSETS, "kid_subset_size": metrics.KID_SUBSET_SIZE}
    assert by_evaluate.items() <= DEFAULTS.items()
    monkeypatch.setattr(metrics, "KID_SUBSET_SIZE", 100)  # which takes a hundredth of the time
    samples = write_folder(tmp_path / "samples", noisy_digits(400))
    originals = write_folder(tmp_path / "real", noisy_digits(600, 0))
    here(
        "evaluate", "--samples", samples, "--reference", originals, "--feature_extractor", "digits", f"data.root={tmp_path}",
        "--metrics", "fid", "kid", "prc", "--no_control",
    )  # fmt: skip
    by_evaluate = json.loads((tmp_path / "samples_evaluation/results.jsonl").read_text())["metrics"]
    by_torch_fidelity = torch_fidelity.calculate_metrics(
        input1=str(samples), input2=str(originals), feature_extractor="digits", cuda=False, fid=True, kid=True, prc=True,
        kid_subset_size=100, verbose=False, save_cpu_ram=True, cache=False,
    )  # fmt: skip
    assert by_evaluate["FD-digits"] == pytest.approx(by_torch_fidelity["frechet_inception_distance"], rel=1e-4)
    assert by_evaluate["KD-digits"] == pytest.approx(by_torch_fidelity["kernel_inception_distance_mean"], rel=1e-4)
    assert by_evaluate["precision"] == pytest.approx(by_torch_fidelity["precision"], rel=1e-4)
    assert by_evaluate["recall"] == pytest.approx(by_torch_fidelity["recall"], rel=1e-4)


@pytest.mark.parametrize("number", [1.5, np.float32(1.5), torch.tensor(1.5)], ids=["float", "numpy", "tensor"])
def test_a_plain_number_has_no_interval(monkeypatch, extractor, real, number):
    monkeypatch.setitem(metrics.METRICS, "mine", metrics.Metric(lambda c: {"m": number}))
    same = Comparison(extractor, feature_set(noisy_digits(20, 0), extractor), real)
    assert estimates(same, "mine") == {"m": (1.5, None)}


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        (1.5, "metric mine: returns a float; must return a dict"),
        ({"m": "low"}, "metric mine: m is a str; must be a number"),
    ],
)
def test_a_metric_without_numbers_is_named(monkeypatch, extractor, real, returned, message):
    monkeypatch.setitem(metrics.METRICS, "mine", metrics.Metric(lambda c: returned))
    same = Comparison(extractor, feature_set(noisy_digits(20, 0), extractor), real)
    with pytest.raises(ValueError, match=message):
        metrics.evaluate(same, ["mine"])


def test_a_direction_is_higher_or_lower():
    with pytest.raises(ValueError, match="m: 'up' is better; must be higher or lower"):
        metrics.Metric(lambda c: {"m": 1.5}, {"m": "up"})


def test_a_set_is_at_distance_zero_from_itself(extractor, real):
    same = Comparison(extractor, feature_set(noisy_digits(1797, 0), extractor), real)
    columns = values(same, "fid", "prc")
    assert abs(columns["FD-digits"]) < 1e-6
    assert columns["precision"] == columns["recall"] == 1


def test_frechet_distance_of_gaussians():
    """Also for singular covariances, and for more features than images."""
    mu = np.array([1.0, 2.0, 0.0])
    a, b = np.diag([4.0, 1.0, 0.0]), np.diag([1.0, 1.0, 9.0])
    assert frechet_distance(Moments(mu, a), Moments(mu * 0, b)) == pytest.approx(5 + 1 + 9)
    few = np.random.default_rng(0).normal(size=(20, 200))
    same = Moments(few.mean(0), np.cov(few, rowvar=False))
    assert abs(frechet_distance(same, same)) < 1e-6


def test_distance_grows_with_noise_and_accuracy_falls(extractor, real):
    labels = datasets.build("digits", None, {}).labels.numpy()
    by_noise = [
        values(Comparison(extractor, feature_set(noisy_digits(1797, s), extractor), real, labels), "fid", "accuracy")
        for s in (0, 30, 90)
    ]
    assert by_noise[0]["FD-digits"] < by_noise[1]["FD-digits"] < by_noise[2]["FD-digits"]
    assert by_noise[0]["accuracy"] > 0.99 and by_noise[2]["accuracy"] < 0.9


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
    assert list(values(c, "accuracy")) == ["accuracy"] * known


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


def test_accuracy_beside_another_extractor(here, monkeypatch, tmp_path, tiny_run):
    """By the classifier of the data set; what else has no value is named once."""
    monkeypatch.setitem(FEATURE_EXTRACTORS_REGISTRY, "pixels", PixelFeatures)
    command = ["evaluate", "--weights", tiny_run, "--n_samples", 70, "--sampling_steps", 1, 2]
    here(*command, "--feature_extractor", "digits", "--out", tmp_path / "digits")
    printed = here(
        *command, "--feature_extractor", "pixels", "--metrics", "fid", "accuracy", "isc", "--out", tmp_path / "pixels"
    )
    assert printed.count("note: no value of isc here") == 1
    own, beside = ([row for row in results.read(tmp_path / name) if row.get("NFE")] for name in ("digits", "pixels"))
    assert [row["metrics"]["accuracy"] for row in beside] == [row["metrics"]["accuracy"] for row in own]
    assert all(row["metrics"]["FD-pixels"] > 0 for row in beside) and len(beside) == 2


def test_distances_of_classes(extractor, real, tmp_path):
    """Each against the images of its class; a class with too few images has none, and the table says why."""
    data = datasets.build("digits", None, {})
    labels = data.labels.numpy()
    real = replace(real, labels=labels, class_names=data.class_names)
    chosen_rows = np.sort(np.concatenate([np.flatnonzero(labels != 7), np.flatnonzero(labels == 7)[:60]]))
    samples = feature_set(noisy_digits(1797), extractor).select("64", chosen_rows)
    c = Comparison(extractor, samples, real, labels[chosen_rows])
    measured = estimates(c, "fid", "per_class")
    assert set(measured) == {"FD-digits", *(f"FD-digits[{k}]" for k in range(10) if k != 7)}
    assert all(estimate.standard_error for estimate in measured.values())
    columns = {name: estimate.value for name, estimate in measured.items()}
    threes = [features.matrix("64").double().numpy()[chosen == 3] for features, chosen in (
        (samples, labels[chosen_rows]), (real.feature_set, labels))]  # fmt: skip
    moments = [Moments(x.mean(0), np.cov(x.T)) for x in threes]
    assert columns["FD-digits[3]"] == pytest.approx(frechet_distance(*moments))
    row = {"weights": "w", "n": len(chosen_rows), "identity": {}, "seconds": 1.0, "requested": ["fid"], "NFE": 1, "forwards": 1}
    rows = [
        {**row, "first": i, "identity": {"i": i}, "metrics": {**columns, **more}}
        for i, more in enumerate(({}, {"FD-digits[7]": 1.0}))
    ]
    printed = table.write(tmp_path, rows)
    text = (tmp_path / "per_class.md").read_text()
    assert text.strip() in printed and table.CLASS_NOTE in text and "FD-digits[3]" in text
    assert "[3]" not in (tmp_path / "results.md").read_text() and "FD-digits[3]" in (tmp_path / "results.csv").read_text()


def inception(n: int) -> tuple[FeatureSpace, FeatureSet]:
    """What Inception would give of n images, at random, with eight features."""
    features, generator = FeatureSet(), torch.Generator().manual_seed(0)
    outputs = {name: torch.randn(n, 8, generator=generator) for name in ("2048", "logits_unbiased")}
    features.add("2048", range(n), outputs)
    return FeatureSpace(INCEPTION, "2048"), features


@pytest.mark.parametrize("n", [9, 10, 25])
def test_the_inception_score_is_a_number_or_absent(n):
    space, features = inception(n)
    real = reference.from_features("x", "x", inception(50)[1], "2048")
    measured = estimates(Comparison(space, features, real), *metrics.DEFAULT)
    assert ("IS" in measured) == (n >= 10) and all(math.isfinite(estimate.value) for estimate in measured.values())
    if n >= 10:
        expected = isc_features_to_metric(features.matrix("logits_unbiased"))
        assert measured["IS"].value == expected["inception_score_mean"]
        half_width = student.ppf(0.975, 9) * expected["inception_score_std"] / 3  # of the mean of ten splits
        assert NORMAL_95 * measured["IS"].standard_error == pytest.approx(half_width)


def test_reference_that_is_not_finite_is_refused(extractor):
    features = feature_set(noisy_digits(200), extractor)
    features.rows["64"][1][17, 3] = np.nan
    with pytest.raises(ValueError, match="of 1 of 200 images of mine are not finite"):
        reference.from_features("mine", "x", features, "64")
