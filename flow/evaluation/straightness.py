"""How far a flow is from straight."""

import torch
from accelerate import Accelerator
from torch import Tensor

from flow import solvers
from flow.model import FlowModel
from flow.sampling.generate import build_velocity, to_solver_dtype
from flow.sampling.settings import SamplerSettings


@torch.inference_mode()
def mean_straightness_deviation(
    accelerator: Accelerator, model: FlowModel, indices: range, settings: SamplerSettings,
    steps: int,
) -> tuple[float, float]:  # fmt: skip
    """Mean and standard error of the deviation from straightness over these images, by so many Euler steps."""
    model.eval()
    x0 = to_solver_dtype(model.draw_x0("sample", settings.seed, indices), accelerator.device)
    with accelerator.autocast():
        deviation = straightness_deviation(build_velocity(model, indices, settings, accelerator.device), x0, steps).cpu()
    return deviation.mean().item(), deviation.std().item() / len(deviation) ** 0.5


def straightness_deviation(velocity: solvers.Velocity, x0: Tensor, steps: int) -> Tensor:
    """S [B]: the integral over t of |(z_1 - z_0) - v(z_t, t)|^2 along the flow of each x0 [B, ...], mean over elements.

    The measure S(Z) of Liu et al. 2023 (arXiv:2209.03003), there as an expectation over x0 and called straightness: it is 0
    for a straight flow and grows with the deviation. On the grid of N Euler steps the
    displacement is the mean velocity, so S is the mean of |v|^2 less the square of the mean of v: no trajectory is stored.
    """
    x, mean, square = x0, x0 * 0, x0 * 0
    for i in range(steps):
        v = velocity(x, i / steps, i / steps)
        x, mean, square = x + v / steps, mean + v / steps, square + v.square() / steps
    return (square - mean.square()).flatten(1).mean(1)
