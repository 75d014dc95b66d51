"""Features of images: those of several processes, the classifiers, layers of Inception."""

import json

import numpy as np
import pytest
import torch
import torch_fidelity
from conftest import run_script
from digits_features import CPU, digits_extractor, feature_set, noisy_digits, write_folder

import datasets
from flow.evaluation import metrics, reference
from flow.evaluation.classifiers import weights_file
from flow.evaluation.comparison import Comparison
from flow.evaluation.features import INCEPTION, Extractor, FeatureSet, FeatureSpace, merge

extractor = pytest.fixture(digits_extractor, scope="module")


def test_images_of_other_channels_are_refused(extractor):
    with pytest.raises(ValueError, match="--feature_extractor digits: takes images of 1 or 3 channels, these have 4"):
        extractor.dimension((4, 8, 8))


def test_merging_processes_changes_nothing(extractor):
    images = noisy_digits(300)
    whole = feature_set(images, extractor)
    parts = [FeatureSet(), FeatureSet()]
    for number, first in enumerate(range(0, 300, 100)):
        parts[number % 2].add(extractor.layer, range(first, first + 100), extractor(images[first : first + 100]))
    merged = merge(parts)
    assert torch.equal(merged.matrix("64"), whole.matrix("64"))  # in the order of the images
    assert np.array_equal(merged.moments.sigma, whole.moments.sigma) and np.array_equal(merged.moments.mu, whole.moments.mu)
    assert np.allclose(whole.moments.sigma, np.cov(whole.matrix("64").double().numpy(), rowvar=False), rtol=1e-9, atol=1e-12)


def test_features_that_are_not_finite_are_counted(extractor):
    """In any of the processes; the first by index is named, though it was not added first."""
    images, layer = noisy_digits(300), extractor.layer
    real = reference.from_features("digits", "x", feature_set(noisy_digits(1797, 0), extractor), layer)
    parts = [FeatureSet(), FeatureSet()]
    for number, first in enumerate((200, 0, 100)):
        features = extractor(images[first : first + 100])[layer].clone()
        for image, value in ((210, np.inf), (117, np.nan)):
            if image in range(first, first + 100):
                features[image - first, 5] = value
        parts[number % 2].add(layer, range(first, first + 100), {layer: features})
    message = r"the features of 2 of 300 images of the samples are not finite .* the first is image 117"
    with pytest.raises(ValueError, match=message):
        metrics.evaluate(Comparison(extractor, merge(parts), real), ["fid"])


@pytest.mark.parametrize(("name", "least"), [("digits", 0.98), ("mnist", 0.98), ("cifar10", 0.85)])
def test_classifiers_know_their_classes(request, name, least):
    """From a file under 1 MB; images of the test split, but for the digits, which have none."""
    root = None if name == "digits" else request.getfixturevalue("real_data")
    data = datasets.build(name, root, {} if name == "digits" else {"train": False})
    extractor = Extractor(name, None, None, CPU)
    logits = extractor(data.images[:500])["logits"]
    assert (logits.argmax(1) == data.labels[:500]).float().mean() > least
    assert weights_file(name).stat().st_size < 1e6


def test_only_inception_2048_is_called_fid():
    spaces = ((INCEPTION, "2048"), (INCEPTION, "768"), ("mnist", "64"), ("mnist", "logits"))
    names = [FeatureSpace(*names).distance_name for names in spaces]
    assert names == ["FID", "FD-inception-768", "FD-mnist", "FD-mnist-logits"]


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
    by_evaluate = json.loads((tmp_path / "0_evaluation/results.jsonl").read_text())["metrics"]["FD-inception-768"]
    by_torch_fidelity = torch_fidelity.calculate_metrics(
        input1=str(a), input2=str(b), cuda=False, fid=True, feature_layer_fid="768", verbose=False, cache=False,
        feature_extractor_weights_path=str(weights),
    )  # fmt: skip
    assert by_evaluate == pytest.approx(by_torch_fidelity["frechet_inception_distance"], rel=1e-4)
