"""THE sampling function: images by index, sharded over processes."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from flow import prior, solvers
from flow.engine.images import to_uint8
from flow.guidance import GuidedVelocity
from flow.solvers import grid


@dataclass
class Generated:
    """One batch of images."""

    indices: range
    images: Tensor  # uint8 [b, C, H, W], on the CPU
    labels: Tensor | None  # int64 [b], on the CPU
    nfe: int  # velocity evaluations per image
    forwards: int  # network evaluations per image: twice the NFE with guidance


@dataclass(frozen=True)
class SamplerSettings:
    """What, besides the weights and the index, decides an image."""

    method: str = "euler"  # a key of solvers.METHODS
    steps: int = 100
    guidance_scale: float = 1.0
    seed: int = 8888
    labels: tuple[int, ...] | None = None  # image k gets labels[k mod len]; None: all classes in turn


def batches(indices: range, batch_size: int) -> list[range]:
    """Consecutive ranges of `batch_size` indices, the last one shorter; the same for any number of processes."""
    return [indices[i : i + batch_size] for i in range(0, len(indices), batch_size)]


@torch.inference_mode()
def generate(
    accelerator: Accelerator,
    net: nn.Module,
    image_shape: tuple[int, int, int],
    indices: range,
    batch_size: int,
    settings: SamplerSettings,
    skip: Callable[[range], bool] = lambda batch: False,
) -> Iterator[Generated]:
    """The batches of this process, of the images with the given indices.

    Image k is a function of the weights, the settings and k: its noise comes from (seed, k), its label from k. Batches
    are cut by index, never by process, so 1 and 8 processes make the same images. `skip` leaves out finished batches.
    The state of the solver is float64 where the device has it. Raises ValueError for an unknown method, fewer than one
    step, labels out of range, labels or guidance for a network without labels.
    """
    check(settings, net.num_classes)
    net.eval()
    device = accelerator.device
    times = grid.uniform(settings.steps)
    for batch in batches(indices, batch_size)[accelerator.process_index :: accelerator.num_processes]:
        if skip(batch):
            continue
        x0 = prior.noise("sample", settings.seed, batch, image_shape).to(device, non_blocking=True)
        x0 = x0 if device.type == "mps" else x0.double()
        labels = labels_of(batch, settings, net.num_classes)
        y = labels.to(device, non_blocking=True) if labels is not None else None
        velocity = GuidedVelocity(net, y, net.num_classes, settings.guidance_scale)
        with accelerator.autocast():
            solution = solvers.solve(velocity, x0, times, settings.method)
        yield Generated(batch, to_uint8(solution.x).cpu(), labels, solution.nfe, velocity.forwards)


def labels_of(indices: range, settings: SamplerSettings, num_classes: int | None) -> Tensor | None:
    """Labels int64 [n] of the images with the given indices, or None for a network without labels."""
    if num_classes is None:
        return None
    choices: Sequence[int] = settings.labels or range(num_classes)
    return torch.tensor([choices[k % len(choices)] for k in indices])


def check(settings: SamplerSettings, num_classes: int | None) -> None:
    """Raises ValueError for settings that a network with this many classes cannot serve."""
    solvers.check(settings.method)
    grid.uniform(settings.steps)
    if num_classes is None and settings.labels:
        raise ValueError(f"labels={list(settings.labels)}: this network was trained without labels (model.args.num_classes)")
    if num_classes is None and settings.guidance_scale != 1:
        raise ValueError(f"guidance_scale={settings.guidance_scale}: needs a network with labels (model.args.num_classes)")
    for label in settings.labels or ():
        if not 0 <= label < num_classes:
            raise ValueError(f"labels: {label} is out of range; this network knows 0 to {num_classes - 1}")
