"""Couplings: fresh noise, minibatch optimal transport within blocks and classes."""

import itertools

import pytest
import torch
from conftest import TINY_TRAIN

from flow import couplings
from flow.noise import gaussian_noise
from flow.training.logging import read_metrics

SHAPE = (1, 2, 2)


def cost(x0: torch.Tensor, x1: torch.Tensor) -> float:
    return (x0 - x1).square().sum().item()


def test_fresh_noise_by_position():
    x0 = couplings.build("independent", 3, SHAPE, 8, {}).sample_x0([5, 2], [0, 1], torch.zeros(2, *SHAPE), None)
    assert torch.equal(x0, gaussian_noise("train", 3, [5, 2], SHAPE))


def test_the_assignment_is_the_cheapest_of_all():
    x1 = torch.randn(6, *SHAPE)
    ot = couplings.build("ot", 0, SHAPE, 6, {"block": 6})
    x0 = ot.sample_x0(range(6), range(6), x1, None)
    fresh = gaussian_noise("train", 0, range(6), SHAPE)
    assert sorted(x0.flatten(1).tolist()) == sorted(fresh.flatten(1).tolist())  # the same draws in another order
    cheapest = min(cost(fresh[list(order)], x1) for order in itertools.permutations(range(6)))
    assert cost(x0, x1) == pytest.approx(cheapest)


def test_pairs_stay_within_a_class_and_a_block():
    x1, y = torch.randn(16, *SHAPE), torch.tensor([0, 1] * 8)
    fresh = gaussian_noise("train", 3, range(16), SHAPE).flatten(1).tolist()
    x0 = couplings.build("ot", 3, SHAPE, 16, {"block": 8}).sample_x0(range(16), range(16), x1, y).flatten(1).tolist()
    came_from = [fresh.index(row) for row in x0]
    assert sorted(came_from) == list(range(16)) and came_from != list(range(16))
    assert all(row % 2 == source % 2 and row // 8 == source // 8 for row, source in enumerate(came_from))


def test_processes_find_the_same_pairs():
    x1 = torch.randn(16, *SHAPE)
    ot = couplings.build("ot", 0, SHAPE, 8, {"block": 4})
    whole = ot.sample_x0(range(16), range(16), x1, None)
    shares = [ot.sample_x0(range(i, i + 8), range(i, i + 8), x1[i : i + 8], None) for i in (0, 8)]
    assert torch.equal(whole, torch.cat(shares))


def test_pairs_without_generated_ones_draw_nothing():
    """All images are real, and their noise is stored."""

    class NoSource:
        def draw(self, *_):
            raise AssertionError("drawn")

    noise = torch.randn(3, *SHAPE, generator=torch.Generator().manual_seed(0))
    coupling = couplings.PairedCoupling(NoSource(), 0, 0, noise, SHAPE)
    assert torch.equal(coupling.sample_x0([5, 6], [2, 0], torch.zeros(2, *SHAPE), None), noise[[2, 0]])


def test_mistakes():
    with pytest.raises(ValueError, match="unknown coupling 'od'; choose from independent, ot"):
        couplings.build("od", 0, SHAPE, 8, {})
    with pytest.raises(ValueError, match="block=1: must be a whole number of at least 2"):
        couplings.build("ot", 0, SHAPE, 8, {"block": 1})
    with pytest.raises(ValueError, match="independent has no argument 'block'"):
        couplings.build("independent", 0, SHAPE, 8, {"block": 4})
    with pytest.raises(ValueError, match="block=64: must divide the 10 rows"):
        couplings.build("ot", 0, SHAPE, 10, {})


def test_training_with_it(here, error, tmp_path, tiny_run):
    run = tmp_path / "run"
    here("train", *TINY_TRAIN, "-e", run, "flow.coupling=ot", "flow.coupling_args.block=16")
    loss, independent = (read_metrics(folder / "metrics.jsonl")[-1]["loss"] for folder in (run, tiny_run))
    assert 0 < loss < independent  # noise and data of a pair are closer
    message = error("train", *TINY_TRAIN, "-e", tmp_path / "other", "flow.coupling=ot", "flow.coupling_args.block=24")
    assert "flow.coupling_args: block=24: must divide the 32 rows" in message
