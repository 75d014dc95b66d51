"""Moving averages of the weights: exponential ones, measured in images, and power functions for post-hoc EMA."""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from flow import power_ema
from flow.runtime.sharding import copy_, full_tensor, is_sharded, local_shard


class Averages:
    """Averages of all floating-point parameters and buffers of a network, in float32; how they move is up to the subclass."""

    def __init__(self, net: nn.Module, count: int, build: Callable[[], nn.Module] | None = None):
        """count: of averages. build: makes an unsharded network, needed by `average_parameters` where `net` is sharded."""
        self.net, self.build = net, build
        self.shadow: list[dict[str, Tensor]] = [
            {name: value.detach().float().clone() for name, value in _floating(net).items()} for _ in range(count)
        ]

    @torch.no_grad()
    def move(self, shares: Sequence[float]) -> None:
        """average + share (weights - average) for each average, its share in [0, 1]; `weights` are those of the network now."""
        if not shares:
            return
        weights = [local_shard(value.detach()).float() for value in _floating(self.net).values()]
        for share, average in zip(shares, self.shadow, strict=True):
            torch._foreach_lerp_([local_shard(value) for value in average.values()], weights, share)

    @contextmanager
    def average_parameters(self, index: int = 0) -> Iterator[nn.Module]:
        """The network with the averaged weights inside the block. After it the network has its own weights and mode again, also
        after an error.

        Of a sharded network it is an unsharded copy, so that processes may sample different numbers of batches.
        """
        weights = _floating(self.net)
        if any(is_sharded(value) for value in weights.values()):
            if self.build is None:
                raise ValueError("averages of a sharded network are applied to a copy: give a `build` that makes one")
            plain = self.build()
            plain.load_state_dict(self.state_dict(index))
            yield plain.to(local_shard(next(iter(weights.values()))).device)
            return
        backup = {name: value.detach().clone() for name, value in weights.items()}
        was_training = self.net.training
        try:
            copy_(self.shadow[index], weights)
            yield self.net
        finally:
            copy_(backup, weights)
            self.net.train(was_training)

    def state_dict(self, index: int) -> dict[str, Tensor]:
        """A complete state dict of the network with the averaged weights, unsharded; every process calls it."""
        return {name: full_tensor(self.shadow[index].get(name, value)) for name, value in self.net.state_dict().items()}

    def load_state_dict(self, index: int, state: dict[str, Tensor]) -> None:
        copy_({name: state[name] for name in self.shadow[index]}, self.shadow[index])


class Ema(Averages):
    """Exponential moving averages of several half-lives.

    After a step on B images the average moves by 1 - 0.5^(B / H) towards the weights, where the half-life H is at most
    `warmup_ratio` of the images seen so far, so that the random start is soon forgotten (Karras et al. 2022,
    arXiv:2206.00364, table 7, and its training code).
    """

    def __init__(
        self, net: nn.Module, half_lives: list[int], warmup_ratio: float, build: Callable[[], nn.Module] | None = None
    ):
        super().__init__(net, len(half_lives), build)
        self.half_lives, self.warmup_ratio = half_lives, warmup_ratio

    def update(self, batch_size: int, images: int) -> None:
        """Call after an optimizer step on `batch_size` images that brought the total to `images`."""
        max_half_life = images * self.warmup_ratio if self.warmup_ratio > 0 else math.inf
        self.move([1 - 0.5 ** (batch_size / min(half_life, max_half_life)) for half_life in self.half_lives])


class PowerEma(Averages):
    """Power-function averages of several widths (sigma_rel), from which those of other widths follow; see flow/power_ema.py."""

    def __init__(self, net: nn.Module, widths: list[float], build: Callable[[], nn.Module] | None = None):
        super().__init__(net, len(widths), build)
        self.widths = widths

    def update(self, updates: int) -> None:
        """Call after optimizer update number `updates`, from 1; skipped steps do not count."""
        self.move([power_ema.share(width, updates) for width in self.widths])


def _floating(net: nn.Module) -> dict[str, Tensor]:
    return {name: value for name, value in net.state_dict(keep_vars=True).items() if value.is_floating_point()}
