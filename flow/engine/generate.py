"""THE sampling function: images by index, sharded over processes."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from heapq import heapify, heappop, heappush
from itertools import cycle
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from flow import prior, solvers
from flow.engine import runtime
from flow.engine.images import to_uint8
from flow.guidance import FlowModel, GuidedVelocity, Network
from flow.path import Path
from flow.solvers import grid
from flow.solvers.adaptive import ADAPTIVE, OWN_TIMES
from flow.straightness import straightness_deviation


@dataclass
class Generated:
    """One batch of images."""

    indices: range
    x: Tensor  # the end of the flow: images, about [-1, 1], or latents, [b, C, H, W], or points [b, 2], on the device
    labels: Tensor | None  # int64 [b], on the CPU, where they are known
    nfe: int  # velocity evaluations per image
    forwards: int  # network evaluations per image: twice the NFE with guidance
    decode: Callable[[Tensor], Tensor] = lambda x: x  # from x to what people see

    @property
    def images(self) -> Tensor:
        """uint8 [b, C, H, W], on the CPU, decoded where x are latents; points as they are, float32 [b, 2]."""
        return to_uint8(self.decode(self.x)).cpu() if self.x.dim() == 4 else self.x.float().cpu()


class Cost:
    """Evaluations per image: those of all batches are the same but for adaptive methods, where this is the mean."""

    def __init__(self):
        self.images = self.nfe = self.forwards = 0

    def add(self, made: Generated) -> None:
        n = len(made.indices)
        self.images, self.nfe, self.forwards = self.images + n, self.nfe + n * made.nfe, self.forwards + n * made.forwards

    def mean(self, accelerator: Accelerator) -> tuple[float, float]:
        """(NFE, forwards) over the images of all processes, on the main one; whole numbers as such. (0, 0) for no image."""
        parts = runtime.gather_to_main(accelerator, (self.images, self.nfe, self.forwards)) or [(0, 0, 0)]
        images, *sums = (sum(part[i] for part in parts) for i in range(3))
        nfe, forwards = (s // images if s % images == 0 else round(s / images, 2) for s in sums) if images else (0, 0)
        return nfe, forwards


@dataclass(frozen=True)
class SamplerSettings:
    """What, besides the weights and the index, decides an image."""

    method: str = "euler"  # a key of solvers.METHODS
    steps: int = 100
    guidance_scale: float = 1.0
    seed: int = 8888
    labels: tuple[int, ...] | None = None  # image k gets labels[k mod len]; None: all classes in turn
    prompts: tuple[str, ...] | None = None  # for networks that read them: image k gets prompts[k mod len]
    grid: str = "uniform"  # a key of solvers.grid.GRIDS, in the time of the network's own path, or "tuned"
    times: tuple[float, ...] | None = None  # of the tuned grid, on the linear path
    options: tuple[tuple[str, float | str], ...] = ()  # of the method: rtol and atol, or noise_scale and diffusion

    @property
    def solver(self) -> str:
        """The method with what sets it apart from its defaults: 'ab2, tuned grid', 'euler_maruyama, noise_scale=0.5'."""
        chosen = [f"{self.grid} grid"] if self.grid != "uniform" else []
        return ", ".join([self.method, *chosen, *(f"{name}={value}" for name, value in self.options)])


def batches(indices: range, batch_size: int) -> list[range]:
    """Consecutive ranges of `batch_size` indices, the last one shorter; the same for any number of processes."""
    return [indices[i : i + batch_size] for i in range(0, len(indices), batch_size)]


def share(accelerator: Accelerator, indices: range, batch_size: int) -> list[range]:
    """The batches of this process."""
    return batches(indices, batch_size)[accelerator.process_index :: accelerator.num_processes]


@torch.inference_mode()
def generate(
    accelerator: Accelerator,
    model: FlowModel,
    image_shape: tuple[int, ...],
    mine: Iterable[range],
    settings: SamplerSettings,
    stream: str = "sample",
) -> Iterator[Generated]:
    """The images of the batches `mine`, usually those of `share`, batch by batch. `image_shape` is what the network sees.

    Image k is a function of the weights, the settings and k: its noise comes from (stream, seed, k), its label or prompt
    from k. Batches are cut by index, never by process, so 1 and 8 processes make the same images. Methods with tolerances
    meet them over a batch: their images also depend on those beside them, by about the error that the tolerances leave.
    The state of the solver is float64 where the device has it. Raises ValueError for settings that `check` refuses.
    """
    check(settings, model.net)
    model.net.eval()
    times = times_of(settings, model.path)
    for batch in mine:
        x0 = solver_state(prior.noise(stream, settings.seed, batch, image_shape), accelerator.device)
        velocity = velocity_of(model, batch, settings, accelerator.device)
        options: dict[str, Any] = dict(settings.options)
        if settings.method in solvers.STOCHASTIC:
            options["noise"] = partial(increments, settings.seed, batch, image_shape, x0)
        with accelerator.autocast():
            solution = solvers.solve(velocity, x0, times, settings.method, **options)
        labels = labels_of(batch, settings, model.net.num_classes)
        yield Generated(batch, solution.x, labels, solution.nfe, velocity.forwards, partial(decoded, accelerator, model))


def decoded(accelerator: Accelerator, model: FlowModel, x: Tensor) -> Tensor:
    """Images [b, C, H, W], about [-1, 1], of the end x of a flow: x itself, or what its decoder makes of latents."""
    if model.decode is None:
        return x
    with torch.inference_mode(), accelerator.autocast():
        return model.decode(x)


@torch.inference_mode()
def trajectory(
    accelerator: Accelerator, model: FlowModel, image_shape: tuple[int, ...], indices: range, settings: SamplerSettings,
    times: Sequence[float], kept: int | None = None, tick: Callable[[], object] = lambda: None,
) -> tuple[list[Tensor], solvers.Solution]:  # fmt: skip
    """The states at the times, from 0, of the first `kept` images of these (None: of all), and the end of all of them.

    They are solved as one batch, by a deterministic method; `tick` is called at each time.
    """
    model.net.eval()
    x0 = solver_state(prior.noise("sample", settings.seed, indices, image_shape), accelerator.device)
    states = [x0[:kept]]

    def watch(x: Tensor) -> None:
        states.append(x[:kept])
        tick()

    velocity = velocity_of(model, indices, settings, accelerator.device)
    return states, solvers.solve(velocity, x0, times, settings.method, watch, **dict(settings.options))


@torch.inference_mode()
def mean_straightness_deviation(
    accelerator: Accelerator, model: FlowModel, image_shape: tuple[int, ...], indices: range, settings: SamplerSettings,
    steps: int,
) -> tuple[float, float]:  # fmt: skip
    """Mean and standard error of the deviation from straightness over these images, by so many Euler steps."""
    model.net.eval()
    x0 = solver_state(prior.noise("sample", settings.seed, indices, image_shape), accelerator.device)
    with accelerator.autocast():
        found = straightness_deviation(velocity_of(model, indices, settings, accelerator.device), x0, steps).cpu()
    return found.mean().item(), found.std().item() / len(found) ** 0.5


def times_of(settings: SamplerSettings, path: Path) -> list[float]:
    """The time grid, carried over from the network's own path to the linear one, where solvers work."""
    if settings.times:
        return list(settings.times)
    times = grid.build(settings.grid, settings.steps)
    if settings.grid == "edm":  # by the ratio of noise to data, which is the time of the linear path
        return times
    return [0.0, *(path.linear_time(t) for t in times[1:-1]), 1.0]


def increments(seed: int, indices: range, image_shape: tuple[int, ...], like: Tensor, step: int) -> Tensor:
    """Standard normal increments [b, C, H, W] of a step of an SDE, as `like`; a function of (seed, image, step)."""
    return prior.noise(f"increment {step}", seed, indices, image_shape).to(like, non_blocking=True)


def velocity_of(model: FlowModel, indices: Sequence[int], settings: SamplerSettings, device: torch.device) -> GuidedVelocity:
    """The network as the velocity of the images with these indices: their labels or prompts, the guidance scale."""
    net = model.net
    y = labels_of(indices, settings, net.num_classes) if net.num_classes is not None else None
    if net.prompt_bytes and settings.prompts:
        y = net.encode([settings.prompts[k % len(settings.prompts)] for k in indices])
    y = y.to(device, non_blocking=True) if y is not None else None
    return GuidedVelocity(model, y, net.null, settings.guidance_scale)


def solver_state(x: Tensor, device: torch.device) -> Tensor:
    """x on the device in the precision that solvers work in: float64 where the device has it."""
    x = x.to(device, non_blocking=True)
    return x.float() if device.type == "mps" else x.double()


def labels_of(indices: Sequence[int], settings: SamplerSettings, num_classes: int | None) -> Tensor | None:
    """Labels int64 [n] of the images with the given indices; None for a network without labels, unless the settings say
    what the prompts stand for."""
    if num_classes is None and not settings.labels:
        return None
    choices: Sequence[int] = settings.labels or range(num_classes or 0)
    return torch.tensor([choices[k % len(choices)] for k in indices])


def labels_by_frequency(counts: Sequence[int], n: int) -> list[int]:
    """The first n labels of a sequence that gives every class c its share p = counts[c] / sum(counts) from the start on: among
    the first k labels are at least floor(k p) and at most ceil(k p) of each class, for every k.

    A class may come again once its quota k p exceeds the number x of its labels so far, and among those that may, the one with
    the smallest (x + 1) / p comes: a house-monotone apportionment that satisfies quota (Balinski & Young 1979,
    doi:10.1287/moor.4.1.31). Labels from a to b differ from (b - a) p by less than 2 a class. Raises ValueError where no count
    is above 0.
    """
    total = sum(counts)
    if total <= 0:
        raise ValueError(f"counts={list(counts)}: a class with at least one image is needed")
    used = [0] * len(counts)
    waiting = [(0, c) for c, count in enumerate(counts) if count]  # (position from which the class may come again, class)
    heapify(waiting)
    eligible: list[tuple[float, int]] = []  # ((x + 1) / p, class)
    labels: list[int] = []
    for k in range(n):
        while waiting and waiting[0][0] <= k:
            _, c = heappop(waiting)
            heappush(eligible, ((used[c] + 1) * total / counts[c], c))
        _, c = heappop(eligible)
        labels.append(c)
        used[c] += 1
        heappush(waiting, (used[c] * total // counts[c], c))
    return labels


def conditions_in_turn(
    labels: Sequence[int] | None, captions: Sequence[Sequence[str]] | None
) -> tuple[tuple[int, ...] | None, tuple[str, ...] | None]:
    """Labels and prompts of images that take turns over these labels, with captions of each class over all: as many of each."""
    if captions is None:
        return tuple(labels) if labels else None, None
    by_class = [[(label, prompt) for prompt in captions[label]] for label in labels or range(len(captions))]
    pairs = [pair for one_of_each in zip(*by_class, strict=False) for pair in one_of_each]
    return tuple(label for label, _ in pairs), tuple(prompt for _, prompt in pairs)


def conditions_by_frequency(
    counts: Sequence[int], n: int, captions: Sequence[Sequence[str]] | None = None
) -> tuple[tuple[int, ...], tuple[str, ...] | None]:
    """Labels of n images by the frequency of the classes, and prompts: the captions of an image's class in turn."""
    labels = labels_by_frequency(counts, n)
    if captions is None:
        return tuple(labels), None
    turns = [cycle(texts) for texts in captions]
    return tuple(labels), tuple(next(turns[label]) for label in labels)


def check(settings: SamplerSettings, net: Network) -> None:
    """Raises ValueError for settings that the network cannot serve."""
    solvers.check_values(settings.method, **dict(settings.options))
    if not settings.times:
        grid.build(settings.grid, settings.steps)
    if settings.method in OWN_TIMES and settings.grid != "uniform":
        how = "by rtol and atol" if settings.method in ADAPTIVE else "evenly"
        raise ValueError(f"grid={settings.grid}: {settings.method} chooses its own times, {how}")
    if settings.prompts and not net.prompt_bytes:
        raise ValueError("prompts: this network was trained without them (model.args.prompt_bytes)")
    if net.prompt_bytes:
        if not settings.prompts:
            raise ValueError(f"this network reads prompts (of at most {net.prompt_bytes} bytes): give some with --prompts")
        net.encode(list(dict.fromkeys(settings.prompts)))
        if settings.labels and len(settings.labels) != len(settings.prompts):
            raise ValueError(f"labels: {len(settings.labels)} for {len(settings.prompts)} prompts; give one a prompt")
        return
    if net.num_classes is None:
        if settings.labels:
            raise ValueError(
                f"labels={list(settings.labels)}: this network was trained without labels (model.args.num_classes)"
            )
        if settings.guidance_scale != 1:
            raise ValueError(f"guidance_scale={settings.guidance_scale}: needs a network with labels (model.args.num_classes)")
        return
    for label in settings.labels or ():
        if not 0 <= label < net.num_classes:
            raise ValueError(f"labels: {label} is out of range; this network knows 0 to {net.num_classes - 1}")
