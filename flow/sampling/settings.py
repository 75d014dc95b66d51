"""What, besides the weights and the index, decides an image; checked against the network."""

import math
from dataclasses import KW_ONLY, dataclass

from flow import solvers
from flow.model import FlowModel
from flow.path import Path
from flow.solvers import time_grids

ALL_TIMES = (0.0, 1.0)


LONG_STEP = 0.1  # of the time from 0 to 1: over longer ones guidance of a flow map is not that of its flow


@dataclass(frozen=True)
class SamplerSettings:
    """What, besides the weights and the index, decides an image."""

    method: str = "euler"  # a key of solvers.SOLVERS
    steps: int = 100
    guidance_scale: float = 1.0
    _: KW_ONLY
    seed: int = 8888
    labels: tuple[int, ...] | None = None  # image k gets labels[k mod len]; None: all classes in turn
    prompts: tuple[str, ...] | None = None  # for networks that read them: image k gets prompts[k mod len]
    time_grid: str = "uniform"  # a key of solvers.time_grids.GRIDS, in the time of the network's own path, or "optimized"
    times: tuple[float, ...] | None = None  # of the optimized grid, on the linear path
    options: tuple[tuple[str, float | str], ...] = ()  # of the method: rtol and atol, or noise_scale and diffusion
    guidance_interval: tuple[float, float] = ALL_TIMES  # of t: there is guidance from the first to the second
    guide: str | None = None  # of autoguidance: its name, as guide.attach returns it
    source: str | None = None  # what --source names; None: held-out samples of the source of the training

    @property
    def title(self) -> str:
        """The method with what sets it apart from its defaults: 'ab2, optimized grid', 'euler_maruyama, noise_scale=0.5'."""
        grid = [f"{self.time_grid} grid"] if self.time_grid != "uniform" else []
        return ", ".join([self.method, *grid, *(f"{name}={value}" for name, value in self.options)])


def build_time_grid(settings: SamplerSettings, path: Path) -> list[float]:
    """The times of the solver, which works on the linear path: a grid in the network's own time is converted."""
    if settings.times:
        return list(settings.times)
    times = time_grids.build(settings.time_grid, settings.steps)
    # edm goes by the ratio of noise to data, which is the time of the linear path; the others choose their own times on it
    if settings.time_grid == "edm" or solvers.SOLVERS[settings.method].times != "grid":
        return times
    return [0.0, *(path.t_to_linear(t) for t in times[1:-1]), 1.0]


def guidance_note(settings: SamplerSettings, model: FlowModel) -> str | None:
    """Why guidance of this model does less than it says, or None."""
    scale = f"guidance_scale={settings.guidance_scale:g}"
    if settings.guidance_scale == 1:
        return None
    if model.trained_guidance != 1:
        return f"{scale}: comes on top of the scale {model.trained_guidance:g} that the network was trained with"
    if not (settings.guide or model.guide) and not model.null_is_trained:
        return f"{scale}: the null label is not trained (flow.label_dropout=0), so this is not classifier-free guidance"
    # each evaluation of `consistency` leads to t = 1, however many steps there are
    long_steps = settings.method == "consistency" or settings.steps * LONG_STEP < 1
    if model.net.two_times and solvers.SOLVERS[settings.method].whole_step and long_steps:
        return (
            f"{scale}: guides mean velocities of long steps, which is not the guided flow; train with loss.args.guidance_scale"
        )
    return None


def validate(settings: SamplerSettings, model: FlowModel) -> None:
    """Raises ValueError for settings that the model cannot serve."""
    net = model.net
    if settings.method in solvers.STOCHASTIC and model.score_error:
        raise ValueError(
            f"sampling_method={settings.method}: adds noise, which needs a source of Gaussian noise independent of the data "
            f"({model.score_error}); use an ODE solver such as heun"
        )
    solvers.validate_options(settings.method, **dict(settings.options))
    if not 0 <= settings.guidance_scale < math.inf:
        raise ValueError(f"guidance_scale={settings.guidance_scale}: must be a finite number of 0 or more")
    low, high = settings.guidance_interval
    if not 0 <= low < high <= 1:
        raise ValueError(f"guidance_interval={low:g} {high:g}: must be two times from 0 to 1, the smaller first")
    for name, given in {"guidance_interval": (low, high) != ALL_TIMES, "guide_weights": settings.guide}.items():
        if given and settings.guidance_scale == 1:
            raise ValueError(f"{name}: needs a guidance_scale other than 1, which is off")
    if not settings.times:
        time_grids.build(settings.time_grid, settings.steps)
    if solvers.SOLVERS[settings.method].times != "grid" and settings.time_grid != "uniform":
        how = "by rtol and atol" if settings.method in solvers.ADAPTIVE else "evenly"
        raise ValueError(f"time_grid={settings.time_grid}: {settings.method} chooses its own times, {how}")
    for name, values in {"labels": settings.labels, "prompts": settings.prompts}.items():
        if values is not None and not values:
            raise ValueError(f"{name}: must have at least one, or be left out")
    if settings.prompts and not net.max_prompt_bytes:
        raise ValueError("prompts: this network was trained without them (model.args.max_prompt_bytes)")
    if net.max_prompt_bytes:
        if not settings.prompts:
            raise ValueError(f"this network reads prompts (of at most {net.max_prompt_bytes} bytes): give some with --prompts")
        net.encode(list(dict.fromkeys(settings.prompts)))
        if settings.labels and len(settings.labels) != len(settings.prompts):
            raise ValueError(f"labels: {len(settings.labels)} for {len(settings.prompts)} prompts; give one a prompt")
        return
    if net.num_classes is None:
        if settings.labels:
            raise ValueError(
                f"labels={list(settings.labels)}: this network was trained without labels (model.args.num_classes)"
            )
        if settings.guidance_scale != 1 and not (settings.guide or model.guide):
            scale = f"guidance_scale={settings.guidance_scale}"
            raise ValueError(f"{scale}: needs a network with labels (model.args.num_classes), or guide_weights")
        return
    for label in settings.labels or ():
        if not 0 <= label < net.num_classes:
            raise ValueError(f"labels={label}: is out of range; this network has 0 to {net.num_classes - 1}")
