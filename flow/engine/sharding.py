"""Weights that lie in shards on the processes of a run (FSDP2): this process's part of them, and the whole."""

import os
from datetime import timedelta

import torch
from accelerate.state import PartialState
from accelerate.utils import DistributedType
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor

from configs.schema import UserError


def prepare_launch(device_found: bool, timeout: timedelta) -> None:
    """Call before the Accelerator is made. Raises UserError for FSDP's first version, whose flat weights have no names.

    accelerate shards only what it takes for GPUs; gloo shards on CPUs just as well, which the tests live on.
    """
    if os.environ.get("ACCELERATE_USE_FSDP", "").lower() != "true":
        return
    version = os.environ.get("FSDP_VERSION", "1")
    if version != "2":
        raise UserError(f"fsdp_version={version}: must be 2, see configs/accelerate/fsdp.yaml")
    if not device_found and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        PartialState(cpu=True, timeout=timeout)
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU


def local(value: Tensor) -> Tensor:
    """This process's part, which shares its memory with the whole; an unsharded tensor is its own part."""
    return value.to_local() if isinstance(value, DTensor) else value


def whole(value: Tensor) -> Tensor:
    """The unsharded tensor, on the CPU where it had to be gathered; every process calls it, for the same tensors in order."""
    return value.full_tensor().cpu() if isinstance(value, DTensor) else value


@torch.no_grad()
def copy(source: dict[str, Tensor], target: dict[str, Tensor]) -> None:
    """Copy tensors by name; whole ones into the shards of sharded ones."""
    split = {name: _like(source[name], target[name]) for name in source}
    torch._foreach_copy_([local(target[name]) for name in split], [local(value) for value in split.values()])


def _like(value: Tensor, target: Tensor) -> Tensor:
    if not isinstance(target, DTensor) or isinstance(value, DTensor):
        return value
    return distribute_tensor(value.to(target.device), target.device_mesh, target.placements)
