"""The learning rate of each update."""

import numpy as np
import pytest

from configs.schema import OptimizerConfig
from flow.training.optimizer import lr_at


@pytest.mark.parametrize(
    ("schedule", "warmup", "values"),  # of updates 0 .. 10 of 10
    [
        ("constant", 0, [1.0] * 11),
        ("constant", 4, [0.25, 0.5, 0.75] + [1.0] * 8),
        ("linear", 0, [1, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1, 0]),
        ("linear", 2, [0.5, 1, 1, 7 / 8, 6 / 8, 5 / 8, 4 / 8, 3 / 8, 2 / 8, 1 / 8, 0]),
        ("cosine", 0, [(1 + np.cos(np.pi * k / 10)) / 2 for k in range(11)]),
        ("cosine", 2, [0.5, 1, *[(1 + np.cos(np.pi * k / 8)) / 2 for k in range(9)]]),
        ("wsd", 0, [1] * 9 + [0.5, 0]),
        ("wsd", 5, [0.2, 0.4, 0.6, 0.8, 1, 1, 1, 1, 1, 1, 0]),
        ("constant", 20, [(k + 1) / 20 for k in range(11)]),  # a warm-up longer than the run
    ],
)
def test_learning_rate(schedule, warmup, values):
    config = OptimizerConfig(lr=3e-4, warmup_steps=warmup, schedule=schedule)
    rates = [lr_at(config, update, 10) for update in range(11)]
    assert rates == pytest.approx([3e-4 * value for value in values], abs=1e-12)
