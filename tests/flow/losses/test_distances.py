"""Distances by hand."""

import math

import pytest
import torch

from flow.losses import distances


def test_distances():
    a, b = torch.tensor([[3.0, 4.0], [0.0, 0.0]]), torch.zeros(2, 2)
    assert distances.mse(a, b).tolist() == [12.5, 0] and distances.l1(a, b).tolist() == [3.5, 0]
    far, near = distances.pseudo_huber(a, b, c=1e-3)
    assert far.item() == pytest.approx(math.sqrt(12.5), abs=2e-3) and near == 0
    small = distances.pseudo_huber(a * 1e-3, b, c=1.0)[0].item()
    assert small == pytest.approx(12.5e-6 / 2, rel=1e-2)  # mse / (2 c) far below c
    a = torch.zeros(1, 2, requires_grad=True)
    distances.build("pseudo_huber", {"c": 0.03})(a, torch.zeros(1, 2)).sum().backward()
    assert a.grad.isfinite().all()
