"""Exponential moving averages of the weights, measured in images: several half-lives at once."""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from flow.runtime.distributed import copy_, full_tensor, is_sharded, local_shard


class Ema:
    """Averages of all floating-point parameters and buffers of a network, in float32.

    After a step on B images the average moves by 1 - 0.5^(B / H) towards the weights, where the half-life H is at most
    `warmup_ratio` of the images seen so far, so that the random start is soon forgotten (Karras et al. 2022,
    arXiv:2206.00364, table 7, and its training code).
    """

    def __init__(
        self, net: nn.Module, half_lives: list[int], warmup_ratio: float, build: Callable[[], nn.Module] | None = None
    ):
        """build: makes an unsharded network, needed by `average_parameters` where `net` is sharded."""
        self.net, self.half_lives, self.warmup_ratio, self.build = net, half_lives, warmup_ratio, build
        self.shadow: list[dict[str, Tensor]] = [
            {name: value.detach().float().clone() for name, value in _floating(net).items()} for _ in half_lives
        ]

    @torch.no_grad()
    def update(self, batch_size: int, images: int) -> None:
        """Call after an optimizer step on `batch_size` images that brought the total to `images`."""
        weights = [local_shard(value.detach()).float() for value in _floating(self.net).values()]
        max_half_life = images * self.warmup_ratio if self.warmup_ratio > 0 else math.inf
        for half_life, average in zip(self.half_lives, self.shadow, strict=True):
            shards = [local_shard(value) for value in average.values()]
            torch._foreach_lerp_(shards, weights, 1 - 0.5 ** (batch_size / min(half_life, max_half_life)))

    @contextmanager
    def average_parameters(self, index: int = 0) -> Iterator[nn.Module]:
        """The network with the averaged weights inside the block, with its own again after it, whatever happens.

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
        try:
            copy_(self.shadow[index], weights)
            yield self.net
        finally:
            copy_(backup, weights)

    def state_dict(self, index: int) -> dict[str, Tensor]:
        """A complete state dict of the network with the averaged weights, unsharded; every process calls it."""
        return {name: full_tensor(self.shadow[index].get(name, value)) for name, value in self.net.state_dict().items()}

    def load_state_dict(self, index: int, state: dict[str, Tensor]) -> None:
        copy_({name: state[name] for name in self.shadow[index]}, self.shadow[index])


def _floating(net: nn.Module) -> dict[str, Tensor]:
    return {name: value for name, value in net.state_dict(keep_vars=True).items() if value.is_floating_point()}
