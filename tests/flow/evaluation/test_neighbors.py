"""Precision, recall, density and coverage: the authors' numbers, in blocks of bounded size, with honest intervals."""

import numpy as np
import pytest
import torch
from digits_features import estimates
from prdc import compute_prdc
from torch.utils._python_dispatch import TorchDispatchMode
from torch_fidelity.metric_prc import prc_features_to_metric

from flow.evaluation import metrics, neighbors
from flow.evaluation.comparison import Comparison
from flow.evaluation.features import FeatureSet, FeatureSpace
from flow.evaluation.intervals import NORMAL_95, jackknife_standard_error, mean_standard_error, share_standard_error
from flow.evaluation.reference import from_features

SHARES = ("precision", "recall", "density", "coverage")


def gaussians(n: int, d: int, seed: int, scale: float = 1.0) -> torch.Tensor:
    return scale * torch.randn(n, d, generator=torch.Generator().manual_seed(seed)) + 20


def comparison(samples: torch.Tensor, real: torch.Tensor) -> Comparison:
    """Of two sets of features, as of an extractor without classes."""
    sets = [FeatureSet(), FeatureSet()]
    for features, values in zip(sets, (samples, real), strict=True):
        features.add("x", range(len(values)), {"x": values})
    return Comparison(FeatureSpace("some", "x"), sets[0], from_features("real", "", sets[1], "x"))


@pytest.mark.parametrize(("n", "m"), [(130, 200), (64, 65), (7, 300)])
def test_equal_to_the_authors_packages(n, m, monkeypatch):
    """In blocks of 64, precision and recall as torch-fidelity has them, density and coverage as prdc."""
    monkeypatch.setattr(neighbors, "BLOCK", 64)
    samples, real = gaussians(n, 5, 0), gaussians(m, 5, 1)
    c = comparison(samples, real)
    measured = estimates(c, "prc", "density_coverage")
    by_torch_fidelity = prc_features_to_metric(
        samples.double(), real.double(), prc_neighborhood=3, prc_batch_size=1000, save_cpu_ram=False, verbose=False
    )
    by_prdc = compute_prdc(real.double().numpy(), samples.double().numpy(), nearest_k=5)
    assert {name: estimate.value for name, estimate in measured.items()} == pytest.approx({
        "precision": by_torch_fidelity["precision"], "recall": by_torch_fidelity["recall"], "density": by_prdc["density"],
        "coverage": by_prdc["coverage"],
    }, abs=1e-6)  # fmt: skip
    assert set(measured) == set(SHARES) and all(estimate.standard_error for estimate in measured.values())


def test_each_metric_alone_is_the_same():
    samples, real = gaussians(200, 4, 0), gaussians(300, 4, 1)
    both = estimates(comparison(samples, real), "prc", "density_coverage")
    alone = [estimates(comparison(samples, real), name) for name in ("prc", "density_coverage")]
    assert alone[0] | alone[1] == both


def test_distances_are_computed_once(monkeypatch):
    """A pass over the samples, one over the real ones, one between the two; the second row knows the real ones."""
    monkeypatch.setattr(neighbors, "BLOCK", 64)
    samples, real = gaussians(100, 4, 0), gaussians(150, 4, 1)
    first = comparison(samples, real)
    second = Comparison(first.extractor, first.samples, first.reference)
    calls = []
    for c in (first, second):
        c.bar.update = lambda n=1: calls.append(n)
        metrics.evaluate(c, ["prc", "density_coverage"])
    assert len(calls) == (3 + 6 + 6 + 2) + (3 + 6 + 2)  # blocks, and the two metrics of each row


def test_too_few_images_have_no_neighborhoods():
    assert estimates(comparison(gaussians(3, 2, 0), gaussians(9, 2, 1)), "prc", "density_coverage") == {}
    few = estimates(comparison(gaussians(5, 2, 0), gaussians(9, 2, 1)), "prc", "density_coverage")
    assert set(few) == {"precision", "recall"}


def test_no_tensor_holds_the_distances_of_all_pairs(monkeypatch):
    class Largest(TorchDispatchMode):
        size = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            for value in result if isinstance(result, tuple | list) else [result]:
                self.size = max(self.size, value.numel() if isinstance(value, torch.Tensor) else 0)
            return result

    monkeypatch.setattr(neighbors, "BLOCK", 32)
    samples, real = torch.randn(300, 16), torch.randn(400, 16)
    with Largest() as largest:
        neighbors.compare(samples, real, neighbors.nearest_neighbors(real, 5)[0])
        neighbors.nearest_of(samples, real)
    assert largest.size <= 400 * 16  # the features themselves


def test_nearest_of():
    samples, others = gaussians(50, 3, 0), gaussians(70, 3, 1)
    distance, position = neighbors.nearest_of(samples, others)
    expected = torch.cdist(samples.double(), others.double())
    assert torch.equal(position, expected.argmin(1))
    assert torch.allclose(distance.double().sqrt(), expected.amin(1), atol=1e-2)


def test_jackknife_leaves_blocks_out():
    """Recall and coverage without a block are those of the samples that remain."""
    samples, real = gaussians(100, 3, 0), gaussians(120, 3, 1)
    known = neighbors.nearest_neighbors(real, 5)[0]
    whole = neighbors.compare(samples, real, known)
    block = neighbors.block_of(np.arange(100), neighbors.JACKKNIFE_BLOCKS)
    for j in range(neighbors.JACKKNIFE_BLOCKS):
        rest = neighbors.compare(samples[torch.from_numpy(block != j)], real, known)
        assert whole.recall_left_out[j] == pytest.approx(rest.recalled.double().mean().item())
        assert whole.coverage_left_out[j] == pytest.approx(rest.covered.double().mean().item())


@pytest.mark.slow
@pytest.mark.parametrize(("d", "n", "m", "scale"), [(4, 400, 600, 1.0), (8, 500, 500, 0.5), (16, 500, 2000, 0.8)])
def test_intervals_hold_the_mean(d, n, m, scale):
    """95% intervals of 200 sets hold the mean over the sets: 90 to 98%, of recall and coverage at least 93%."""
    real = gaussians(m, d, 0)
    known = neighbors.nearest_neighbors(real, 5)[0]
    values, errors = {name: [] for name in SHARES}, {name: [] for name in SHARES}
    for seed in range(200):
        found = neighbors.compare(gaussians(n, d, seed + 1, scale), real, known)
        density = found.dense.double().numpy() / 5
        measured = {
            "precision": (found.precise.double().mean().item(), None),
            "recall": (found.recalled.double().mean().item(), jackknife_standard_error(found.recall_left_out)),
            "density": (density.mean(), mean_standard_error(density)),
            "coverage": (found.covered.double().mean().item(), jackknife_standard_error(found.coverage_left_out)),
        }
        for name, (value, error) in measured.items():
            values[name].append(value)
            errors[name].append(share_standard_error(value, n) if error is None else error)
    for name in SHARES:
        value, error = np.array(values[name]), np.array(errors[name])
        share = (abs(value - value.mean()) < NORMAL_95 * error).mean()
        low, high = (0.93, 1.0) if name in ("recall", "coverage") else (0.90, 0.98 if value.mean() < 0.98 else 1.0)
        assert low <= share <= high, (name, share)
