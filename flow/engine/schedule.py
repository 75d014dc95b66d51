"""The optimizer, and its learning rate as a function of the number of updates made so far."""

import math

import torch
from torch import nn

from configs.schema import OptimizerConfig


def learning_rate(config: OptimizerConfig, update: int, total: int) -> float:
    """lr of update number `update` (from 0) of `total`: linear warm-up from 0, then constant, linear or cosine to 0."""
    warmup = min(1.0, (update + 1) / config.warmup_steps) if config.warmup_steps else 1.0
    progress = min(1.0, max(0, update - config.warmup_steps) / max(1, total - config.warmup_steps))
    decay = {
        "constant": 1.0,
        "linear": 1 - progress,
        "cosine": (1 + math.cos(math.pi * progress)) / 2,
    }[config.schedule]
    return config.lr * warmup * decay


def set_options(optimizer: torch.optim.Optimizer, config: OptimizerConfig) -> None:
    """Give an optimizer whose state was loaded the betas, eps and weight_decay of the configuration: its own are those of
    the checkpoint."""
    beta1, beta2 = config.betas
    for group in optimizer.param_groups:
        group.update(betas=(beta1, beta2), eps=config.eps, weight_decay=config.weight_decay)


def adamw(net: nn.Module, config: OptimizerConfig, device: torch.device) -> torch.optim.AdamW:
    """The optimizer of a network on this device; its learning rate is then that of `learning_rate` at each step."""
    beta1, beta2 = config.betas
    return torch.optim.AdamW(
        net.parameters(), lr=config.lr, betas=(beta1, beta2), eps=config.eps, weight_decay=config.weight_decay,
        fused=device.type in ("cpu", "cuda"),
    )  # fmt: skip
