"""The reference: statistics in an npz file, the cache of its features, its splits by name."""

import re

import numpy as np
import pytest
from digits_features import digits_extractor, digits_reference, feature_set, noisy_digits, values

from datasets import DataSpec, HeldOut
from flow.evaluation import metrics, reference, results
from flow.evaluation.comparison import Comparison
from flow.noise import generator

extractor = pytest.fixture(digits_extractor, scope="module")
real = pytest.fixture(digits_reference, scope="module")


def test_npz_reference_serves_the_distance_alone(tmp_path, extractor, real):
    np.savez(tmp_path / "stats.npz", mu=real.moments.mu, sigma=real.moments.sigma)
    loaded = reference.from_npz(tmp_path / "stats.npz", extractor, 64)
    samples = feature_set(noisy_digits(500), extractor)
    columns = values(Comparison(extractor, samples, loaded), *metrics.METRICS)
    assert columns == pytest.approx(values(Comparison(extractor, samples, real), "fid"))


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
def test_damaged_statistics_are_named(kind, message, tmp_path, extractor, real):
    path = tmp_path / "stats.npz"
    if kind != "absent":
        damaged_statistics(kind, real.moments.mu, real.moments.sigma, path)
    with pytest.raises(ValueError, match=re.escape(message)) as refused:
        reference.from_npz(path, extractor, 64)
    assert str(path) in str(refused.value)


def test_damaged_statistics_are_one_line(error, tmp_path, tiny_run, real):
    damaged_statistics("nan", real.moments.mu, real.moments.sigma, path := tmp_path / "stats.npz")
    command = ["--weights", tiny_run, "--n_samples", 4, "--sampling_steps", 1, "--feature_extractor", "digits"]
    line = error("evaluate", *command, "--reference", path, "--out", tmp_path / "out")
    assert f"--reference {path}: mu holds values that are not finite" in line


def test_mutated_statistics_are_refused_or_the_same(extractor, real, tmp_path):
    """No flipped byte and no cut changes a number without a word."""
    path = tmp_path / "stats.npz"
    np.savez(path, mu=real.moments.mu, sigma=real.moments.sigma)
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
            assert np.array_equal(loaded.moments.mu, real.moments.mu)
            assert np.array_equal(loaded.moments.sigma, real.moments.sigma)
    assert refused > 200


def test_damaged_caches_are_named_and_computed_again(here, tmp_path, tiny_run):
    command = ["evaluate", "--weights", tiny_run, "--feature_extractor", "digits", "--sampling_steps", 1, "--n_samples", 70]
    command += [f"data.root={tmp_path}", "--no_control"]

    def distance(name: str) -> tuple[str, float]:
        printed = here(*command, "--out", tmp_path / name)
        (row,) = results.read(tmp_path / name)
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


def test_statistics_are_not_of_points(error, tmp_path, points_flow):
    np.savez(tmp_path / "stats.npz", mu=np.zeros(2), sigma=np.eye(2))
    command = ["evaluate", "--weights", points_flow("moons", 1), "--n_samples", 4, "--sampling_steps", 1]
    line = error(*command, "--reference", tmp_path / "stats.npz", "--out", tmp_path / "out")
    assert f"--reference {tmp_path / 'stats.npz'}: points are compared with toys:SHAPE, not with statistics" in line


def test_splits_of_a_reference_by_name(error, tmp_path, tiny_run):
    test = DataSpec("mnist", None, {"train": False})
    assert DataSpec.parse("mnist:test", None) == test
    assert DataSpec.parse("cifar10", None) == DataSpec("cifar10", None, {}) and DataSpec.parse("some/folder:x", None) is None
    assert DataSpec("mnist", None, {}).held_out() == HeldOut("test split", test)
    assert test.held_out().title == "train split" and DataSpec("digits", None, {}).held_out() is None
    command = ["--weights", tiny_run, "--n_samples", 4, "--feature_extractor", "digits", "--out", tmp_path / "out"]
    for name in ("digits:test", "mnist:validation"):
        assert f"{name}: must be NAME, NAME:train or NAME:test" in error("evaluate", *command, "--reference", name)
