"""Tensors that FSDP2 shards over the processes, and whole ones, by the same functions."""

from typing import TYPE_CHECKING, TypeGuard

import torch
from torch import Tensor

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor


def is_sharded(value: Tensor) -> "TypeGuard[DTensor]":
    """Whether this is a DTensor. Its class is not imported for that, which would cost a second at the start of every script."""
    return hasattr(value, "placements")


def local_shard(value: Tensor) -> Tensor:
    """This process's part, which shares its memory with the whole; an unsharded tensor is its own part."""
    return value.to_local() if is_sharded(value) else value


def full_tensor(value: Tensor) -> Tensor:
    """The unsharded tensor, on the CPU where it had to be gathered; every process calls it, for the same tensors in order."""
    return value.full_tensor().cpu() if is_sharded(value) else value


@torch.no_grad()
def copy_(source: dict[str, Tensor], target: dict[str, Tensor]) -> None:
    """Copy tensors by name; whole ones into the shards of sharded ones."""
    split = {name: _shard_like(source[name], target[name]) for name in source}
    torch._foreach_copy_([local_shard(target[name]) for name in split], [local_shard(value) for value in split.values()])


def _shard_like(value: Tensor, target: Tensor) -> Tensor:
    if is_sharded(target) and not is_sharded(value):
        from torch.distributed.tensor import distribute_tensor

        return distribute_tensor(value.to(target.device), target.device_mesh, target.placements)
    return value
