"""Labels of the samples that are measured: as frequent as those of the reference, or in turn."""

import numpy as np
import pytest
import torch
from digits_features import digits_extractor, digits_reference, feature_set, write_folder

import datasets
from flow.evaluation import results, snapshots
from flow.evaluation.frechet import frechet_distance
from flow.sampling.conditions import conditions_by_frequency, labels_by_frequency

extractor = pytest.fixture(digits_extractor, scope="module")
real = pytest.fixture(digits_reference, scope="module")


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
    rows = [row for row in results.read(tmp_path / "out") if not results.is_control(row)]
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
        return frechet_distance(stats[0].moments, stats[1].moments)

    assert 4 * distance(labels_by_frequency(counts, 90)) < distance([k % 2 for k in range(90)])


def test_classes_take_turns_without_data(here, tmp_path, tiny_run, extractor, real):
    """Without data to count, classes take turns."""
    np.savez(tmp_path / "stats.npz", mu=real.moments.mu, sigma=real.moments.sigma)
    command = ["evaluate", "--weights", tiny_run, "--feature_extractor", "digits", "--sampling_steps", 1, "--n_samples", 70]
    command += ["--reference", tmp_path / "stats.npz", "--out", tmp_path / "out"]
    assert "warning" not in here(*command)  # the digits of the training are here
    printed = here(*command, "data.name=folder", f"data.args={{path: {tmp_path / 'none'}}}")
    assert "warning: the classes take turns" in printed and "no row of real images" in printed
