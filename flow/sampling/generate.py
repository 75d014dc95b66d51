"""Sampling: images by index, sharded over processes."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from configs.errors import UserError
from flow import solvers
from flow.guidance import GuidedVelocity
from flow.model import FlowModel
from flow.noise import gaussian_noise
from flow.runtime import distributed
from flow.runtime.errors import error_context
from flow.sampling.conditions import labels_for
from flow.sampling.settings import SamplerSettings, build_time_grid, validate
from flow.sampling.space import Space


@dataclass
class SampleBatch:
    """One batch of images."""

    indices: range
    x: Tensor  # the end of the flow: images, about [-1, 1], or latents, [b, C, H, W], or points [b, 2], on the device
    labels: Tensor | None  # int64 [b], on the CPU, where they are known
    nfe: int  # velocity evaluations per image
    forwards: int  # network calls per image: with guidance up to twice the NFE
    decode: Callable[[Tensor], Tensor] = lambda x: x  # from x to what people see

    @property
    def images(self) -> Tensor:
        """uint8 [b, C, H, W], on the CPU, decoded where x are latents; points as they are, float32 [b, 2]."""
        decoded = self.decode(self.x)
        check_finite(decoded, self.indices)  # latents that are finite may decode to what is not
        return Space(tuple(self.x.shape[1:])).to_visible(decoded)


class NFECounter:
    """Evaluations per image: those of all batches are the same but for adaptive methods, where this is the mean."""

    def __init__(self):
        self.images = self.nfe = self.forwards = 0

    def add(self, batch: SampleBatch) -> None:
        n = len(batch.indices)
        self.images, self.nfe, self.forwards = self.images + n, self.nfe + n * batch.nfe, self.forwards + n * batch.forwards

    def mean(self, accelerator: Accelerator) -> tuple[float, float]:
        """(NFE, forwards) over the images of all processes, on the main one; whole numbers as such. (0, 0) for no image."""
        parts = distributed.gather_to_main(accelerator, (self.images, self.nfe, self.forwards)) or [(0, 0, 0)]
        images, *sums = (sum(part[i] for part in parts) for i in range(3))
        nfe, forwards = (s // images if s % images == 0 else round(s / images, 2) for s in sums) if images else (0, 0)
        return nfe, forwards


def index_batches(indices: range, batch_size: int) -> list[range]:
    """Consecutive ranges of `batch_size` indices, the last one shorter; the same for any number of processes.

    Raises ValueError for less than one.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size={batch_size}: must be a whole number of at least 1")
    return [indices[i : i + batch_size] for i in range(0, len(indices), batch_size)]


def shard(accelerator: Accelerator, indices: range, batch_size: int) -> list[range]:
    """The batches of this process."""
    return index_batches(indices, batch_size)[accelerator.process_index :: accelerator.num_processes]


@torch.inference_mode()
def generate(
    accelerator: Accelerator,
    model: FlowModel,
    batches: Iterable[range],
    settings: SamplerSettings,
) -> Iterator[SampleBatch]:
    """The images of these batches, usually those of `shard`, batch by batch.

    Image k is a function of the weights, the settings and k: its noise comes from ("sample", seed, k), its label or prompt
    from k. Batches are cut by index, never by process, so 1 and 8 processes make the same images. Methods with tolerances
    meet them over a batch: their images also depend on those beside them, by about the error that the tolerances leave.
    The state of the solver is float64 where the device has it. Raises ValueError for settings that `validate` refuses.
    """
    validate(settings, model)
    model.eval()
    for batch in batches:
        yield sample_batch(model, batch, settings, accelerator.device, accelerator.autocast)


def sample_batch(
    model: FlowModel,
    indices: range,
    settings: SamplerSettings,
    device: torch.device,
    autocast: Callable[[], AbstractContextManager] = nullcontext,
    x0: Tensor | None = None,
    callback: Callable[[Tensor], object] | None = None,
) -> SampleBatch:
    """The images with these indices, as `generate` makes them, on one device and without an Accelerator.

    Args:
        autocast: surrounds the calls of network and decoder.
        x0: where the flow starts, [b, ...]; None: the samples of the source with these indices.
        callback: gets the state at each time of the grid but the first.

    Raises:
        UserError: where the end of the flow is not finite.
    """
    start = model.draw_x0("sample", settings.seed, indices) if x0 is None else x0
    start = to_solver_dtype(start, device)
    velocity = build_velocity(model, indices, settings, device)
    options: dict[str, Any] = dict(settings.options)
    if settings.method in solvers.STOCHASTIC:
        options["noise"] = partial(increments, settings.seed, indices, start)
    times = build_time_grid(settings, model.path)
    with autocast(), error_context(f"sampling_method={settings.method}"):
        solution = solvers.solve(velocity, start, times, settings.method, callback, **options)
    check_finite(solution.x, indices)
    labels = labels_for(indices, settings, model.net.num_classes)
    return SampleBatch(indices, solution.x, labels, solution.nfe, velocity.forwards, partial(decode, model, autocast))


def check_finite(x: Tensor, indices: Sequence[int]) -> None:
    """Raises UserError for numbers in x [b, ...] that are not finite, which would be black images."""
    finite = x.isfinite().flatten(1).all(1)
    if not finite.all():
        k = indices[int(finite.int().argmin())]
        raise UserError(f"image {k}: its numbers are not finite; a smaller guidance_scale or mixed_precision=no may help")


def decode(model: FlowModel, autocast: Callable[[], AbstractContextManager], x: Tensor) -> Tensor:
    """Images [b, C, H, W], about [-1, 1], of the end x of a flow: x itself, or the decoded latents."""
    if model.decode is None:
        return x
    with torch.inference_mode(), autocast():
        return model.decode(x)


@torch.inference_mode()
def trajectory(
    accelerator: Accelerator, model: FlowModel, indices: range, settings: SamplerSettings, times: Sequence[float],
    num_keep: int | None = None, callback: Callable[[], object] = lambda: None,
) -> tuple[list[Tensor], SampleBatch]:  # fmt: skip
    """The states at the times, from 0, of the first `num_keep` images of these (None: of all), and the end of all of them.

    They are solved as one batch, over these times in place of those of the settings; `callback` is called at each time but the
    first. Raises UserError where the end is not finite.
    """
    model.eval()
    x0 = to_solver_dtype(model.draw_x0("sample", settings.seed, indices), accelerator.device)
    states = [x0[:num_keep]]

    def record(x: Tensor) -> None:
        states.append(x[:num_keep])
        callback()

    settings = replace(settings, times=tuple(times))
    return states, sample_batch(model, indices, settings, accelerator.device, accelerator.autocast, x0, record)


def increments(seed: int, indices: range, like: Tensor, step: int) -> Tensor:
    """Standard normal increments [b, C, H, W] of a step of an SDE, as `like`; a function of (seed, image, step)."""
    return distributed.to_device(gaussian_noise(f"increment {step}", seed, indices, tuple(like.shape[1:])), like.device).to(
        like.dtype
    )


def build_velocity(model: FlowModel, indices: Sequence[int], settings: SamplerSettings, device: torch.device) -> GuidedVelocity:
    """The network as the velocity of the images with these indices: their labels or prompts, and the guidance."""
    net = model.net
    y = labels_for(indices, settings, net.num_classes) if net.num_classes is not None else None
    if net.max_prompt_bytes and settings.prompts:
        y = net.encode([settings.prompts[k % len(settings.prompts)] for k in indices])
    y = distributed.to_device(y, device) if y is not None else None
    guide = build_velocity(model.guide, indices, replace(settings, guidance_scale=1.0), device) if model.guide else None
    return GuidedVelocity(model, y, net.null, settings.guidance_scale, settings.guidance_interval, guide)


def to_solver_dtype(x: Tensor, device: torch.device) -> Tensor:
    """x on the device in the precision that solvers work in: float64 where the device has it."""
    x = distributed.to_device(x, device)
    return x.float() if device.type == "mps" else x.double()
