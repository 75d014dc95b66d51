"""Random numbers: functions of their keys, independent of each other, standard normal."""

import numpy as np
import pytest
import torch
from scipy import stats

from flow.noise import gaussian_noise, generator, generators


def test_a_generator_is_a_function_of_its_key():
    assert generator("time", 1, 2).random(5).tolist() == generator("time", 1, 2).random(5).tolist()


def test_generators_in_a_row_are_those_one_by_one():
    """Also after draws that leave half a word in the buffer."""
    for g, p in zip(generators("noise", 7, positions=[3, 0, np.int64(2**40)]), [3, 0, 2**40], strict=True):
        alone = generator("noise", 7, p)
        for draw in (lambda g: g.integers(2, size=3, dtype=np.int32), lambda g: g.standard_normal(5, dtype=np.float32)):
            assert draw(g).tolist() == draw(alone).tolist()


def test_different_keys_differ():
    keys = [
        ("time", 0, 1), ("time", 1, 0), ("flip", 0, 1), ("time", 0), ("time", 0, 1, 0), ("time", 0, -1), ("time", 10),
        ("time", 1, 1), ("time", 2**32, 1), ("time", 2**64, 1), ("time", "0", 1),
    ]  # fmt: skip
    draws = {generator(*key).random() for key in keys}
    assert len(draws) == len(keys)


@pytest.mark.parametrize("far", [2**31, 2**32, 2**40, 2**64])
def test_seeds_and_indices_far_apart_differ(far):
    """Generators that keep 32 bits of their seed repeat themselves here."""
    assert not torch.equal(gaussian_noise("s", 1, [0], (4,)), gaussian_noise("s", 1 + far, [0], (4,)))
    assert not torch.equal(gaussian_noise("s", 1, [3], (4,)), gaussian_noise("s", 1, [3 + far], (4,)))


def test_neighbouring_generators_are_uncorrelated():
    draws = np.stack([generator("time", 0, step).standard_normal(2000) for step in range(20)])
    off_diagonal = np.corrcoef(draws)[~np.eye(20, dtype=bool)]
    assert np.abs(off_diagonal).max() < 4.5 / 2000**0.5  # 190 pairs


def test_noise_of_an_image_depends_on_its_index_alone():
    whole = gaussian_noise("sample", 8888, range(10), (3, 4, 5))
    assert whole.shape == (10, 3, 4, 5) and whole.dtype == torch.float32
    assert torch.equal(gaussian_noise("sample", 8888, [7, 2], (3, 4, 5)), whole[[7, 2]])
    assert torch.equal(gaussian_noise("sample", 8888, torch.tensor([7]), (3, 4, 5)), whole[7:8])
    assert torch.equal(gaussian_noise("sample", 8888, np.array([7]), (3, 4, 5)), whole[7:8])
    assert not torch.equal(gaussian_noise("train", 8888, [7], (3, 4, 5)), whole[7:8])
    assert gaussian_noise("sample", 8888, [], (3, 4, 5)).shape == (0, 3, 4, 5)


def test_noise_is_standard_normal():
    x0 = gaussian_noise("sample", 0, range(400), (10, 10)).double()  # 40,000 numbers
    n = x0.numel()
    for moment, expected, variance in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)):
        assert abs(x0.pow(moment).mean() - expected) < 4 * (variance / n) ** 0.5
    across = x0.mean(0)  # of a pixel over images: images are independent of each other
    assert across.var() == pytest.approx(1 / 400, rel=4 * (2 / 100) ** 0.5)
    assert stats.kstest(x0.flatten(), "norm").pvalue > 1e-4
