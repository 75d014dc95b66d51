"""Distances between a prediction and its target, one number per sample."""

from collections.abc import Callable

import torch
from torch import Tensor

from flow import registry

Distance = Callable[[Tensor, Tensor], Tensor]


def mse(a: Tensor, b: Tensor) -> Tensor:
    """Mean of the squared differences: [B, ...], [B, ...] -> [B]."""
    return (a - b).square().flatten(1).mean(1)


def l1(a: Tensor, b: Tensor) -> Tensor:
    """Mean of the absolute differences: [B, ...], [B, ...] -> [B]."""
    return (a - b).abs().flatten(1).mean(1)


def pseudo_huber(a: Tensor, b: Tensor, c: float = 0.00054) -> Tensor:
    """sqrt(|a - b|^2 / d + c^2) - c with d elements a sample: [B, ...], [B, ...] -> [B].

    The metric sqrt(|a - b|^2 + c_d^2) - c_d with c_d = 0.00054 sqrt(d) of Song & Dhariwal 2023 (arXiv:2310.14189), divided by
    sqrt(d). It is the root mean square error far above c and mse / (2 c) far below, so outliers weigh less than with mse. For
    reflow Lee, Lin & Fanti 2024 (arXiv:2405.20320) use c_d = 0.00054 d, which is c = 0.00054 sqrt(d) here.
    """
    if c <= 0:
        raise ValueError(f"c={c}: must be greater than 0")
    return (mse(a, b) + c**2).sqrt() - c


DISTANCES: dict[str, Callable[..., Tensor]] = {"mse": mse, "l1": l1, "pseudo_huber": pseudo_huber}


def build(name: str, args: dict[str, float]) -> Distance:
    """The distance of that name. Raises ValueError for an unknown name or argument and for a value out of range."""
    distance = registry.pick("distance", DISTANCES, name, args)
    distance(torch.zeros(1, 1), torch.zeros(1, 1))  # checks the values
    return distance
