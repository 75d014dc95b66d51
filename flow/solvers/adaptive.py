"""Adaptive methods: torchdiffeq's, up to just before the data end, then one Euler step."""

import inspect
from collections.abc import Callable, Sequence

from torch import Tensor

ADAPTIVE = ("dopri5", "dopri8", "bosh3", "fehlberg2", "adaptive_heun")
LAST_STEP = 1e-3  # no network is asked about t = 1


def adaptive(
    velocity: Callable[[Tensor, float], Tensor],
    x: Tensor,
    grid: Sequence[float],
    method: str,
    rtol: float = 1e-5,
    atol: float = 1e-5,
) -> Tensor:
    """From grid[0] to grid[-1] with the step sizes that the tolerances ask for; the times between are not used.

    One step size serves the whole batch, so an image depends on those beside it, by about the error that the tolerances
    leave. Raises ValueError for a
    tolerance of 0 or less.
    """
    import torch  # torchdiffeq takes a second that other methods need not pay
    from torchdiffeq import odeint

    for name, value in (("rtol", rtol), ("atol", atol)):
        if not 0 < value < 1:
            raise ValueError(f"{name}={value}: must be greater than 0 and less than 1")
    end = grid[-1] - LAST_STEP if grid[-1] == 1 else grid[-1]
    times = torch.tensor([grid[0], end], dtype=x.dtype, device=x.device)
    x = odeint(lambda t, x: velocity(x, float(t)), x, times, method=method, rtol=rtol, atol=atol)[-1]
    return x + LAST_STEP * velocity(x, end) if grid[-1] == 1 else x


OPTIONS = tuple(inspect.signature(adaptive).parameters)[4:]
