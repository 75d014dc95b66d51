"""The noise that a flow would have made an image from."""

from collections.abc import Callable

from torch import Tensor

from flow import solvers

T_MAX = 0.98  # the marginal there still shows the noise, which is mixed into the image


def invert(velocity: Callable[[Tensor, float], Tensor], x1: Tensor, noise: Tensor, steps: int, method: str) -> Tensor:
    """x0 [B, ...] of the images x1 [B, ...]: the flow solved from t = 0.98 back to 0 in `steps` steps.

    It starts at x_t = t x1 + (1 - t) noise with standard normal noise [B, ...], a sample of the flow's own marginal at
    that time: a clean image has no place there, and would come out as noise of too small a variance.
    """
    times = [T_MAX * (1 - i / steps) for i in range(steps + 1)]
    return solvers.solve(velocity, T_MAX * x1 + (1 - T_MAX) * noise, times, method).x
