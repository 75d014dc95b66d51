"""The noise that a flow would have made an image from."""

from collections.abc import Callable

from torch import Tensor

from flow import solvers

START = 0.98  # no network is asked about t = 1, where the noise can no longer be seen


def invert(velocity: Callable[[Tensor, float], Tensor], x1: Tensor, noise: Tensor, steps: int, method: str) -> Tensor:
    """x0 [B, ...] of the images x1 [B, ...]: the flow solved from t = 0.98 back to 0 in `steps` steps.

    It starts at x_t = t x1 + (1 - t) noise with standard normal noise [B, ...], a sample of the flow's own marginal at
    that time: a clean image has no place there, and would come out as noise of too small a variance.
    """
    times = [START * (1 - i / steps) for i in range(steps + 1)]
    return solvers.solve(velocity, START * x1 + (1 - START) * noise, times, method).x
