"""The learning rate of each update, and the length of a step."""

import numpy as np
import pytest
import torch
from accelerate import Accelerator

from configs.schema import Config, OptimizerConfig
from flow.training.optimizer import OptimizerStep, lr_at


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


@pytest.mark.parametrize(("clip", "length"), [(1.0, 1.0), (10.0, 5.0), (0.0, 5.0)])
def test_gradient_is_clipped_to_its_norm(clip, length):
    """One of norm 5, whose norm before clipping comes out; 0 turns it off."""
    config, net, accelerator = Config(), torch.nn.Linear(2, 1, bias=False), Accelerator(cpu=True)
    config.optimizer.clip_grad_norm = clip
    torch.nn.init.zeros_(net.weight)
    net.weight.grad = torch.tensor([[3.0, 4.0]])
    optimizer = accelerator.prepare(torch.optim.SGD(net.parameters(), lr=1))
    norm, updated = OptimizerStep(net, optimizer, accelerator, config).clip_and_step()
    assert (norm.item(), updated) == (5, True)
    torch.testing.assert_close(net.weight.data, torch.tensor([[-3.0, -4.0]]) * (length / 5))
