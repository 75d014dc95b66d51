"""How far a flow is from straight: 0 where one Euler step gives what a thousand give."""

from collections.abc import Callable

from torch import Tensor


def straightness_deviation(velocity: Callable[[Tensor, float], Tensor], x0: Tensor, steps: int) -> Tensor:
    """S [B]: the integral over t of |(z_1 - z_0) - v(z_t, t)|^2 along the flow of each x0 [B, ...], mean over elements.

    The measure S(Z) of Liu et al. 2023 (arXiv:2209.03003), there as an expectation over x0 and called straightness: it is 0
    for a straight flow and grows with the deviation. On the grid of N Euler steps the
    displacement is the mean velocity, so S is the mean of |v|^2 less the square of the mean of v: no trajectory is kept.
    """
    x, mean, square = x0, x0 * 0, x0 * 0
    for i in range(steps):
        v = velocity(x, i / steps)
        x, mean, square = x + v / steps, mean + v / steps, square + v.square() / steps
    return (square - mean.square()).flatten(1).mean(1)
