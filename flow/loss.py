"""The regression loss of flow matching."""

from collections.abc import Callable

from torch import Tensor

from flow.path import LinearPath


def flow_matching_loss(
    net: Callable[..., Tensor], path: LinearPath, x0: Tensor, x1: Tensor, t: Tensor, y: Tensor | None = None
) -> Tensor:
    """Per-sample loss [B]: mean over elements of |net(x_t, t, y) - v|^2, in float32.

    Conditional flow matching (Lipman et al. 2023, arXiv:2210.02747, eq. 9), here with the velocity of `path` as the
    conditional vector field. x0 noise and x1 data [B, ...], t [B], y labels [B] or None.
    """
    v = path.velocity(x0, x1)
    prediction = net(path.interpolate(x0, x1, t), t, y)
    return (prediction.float() - v).square().flatten(1).mean(1)
