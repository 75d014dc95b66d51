"""A network that predicts velocities, scaled by t so that its input and its target have unit variance."""

import math
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn


class Preconditioned(nn.Module):
    """v(x, t) = c_skip(t) x + c_out(t) net(c_in(t) x, t) on the linear path, for data of standard deviation s.

    The preconditioning of EDM (Karras et al. 2022, arXiv:2206.00364, table 1), which the paper derives for prediction of the
    data; here it is that for the velocity x1 - x0 of x_t = t x1 + (1 - t) x0. With n = t^2 s^2 + (1 - t)^2, the variance of
    x_t: c_in = 1 / sqrt(n) gives the input unit variance, c_skip = (t s^2 - (1 - t)) / n is the regression of the velocity on
    x_t, and c_out = s / sqrt(n) is the standard deviation of its residual.
    """

    def __init__(self, net: nn.Module, data_std: float):
        """net: any network of `models`. data_std: s, of images in [-1, 1]. Raises ValueError where it is not above 0."""
        super().__init__()
        if isinstance(data_std, bool) or not isinstance(data_std, int | float) or not 0 < data_std < math.inf:
            raise ValueError(f"data_std={data_std!r}: must be a finite number above 0")
        self.net, self.data_std = net, data_std
        for name in ("num_classes", "max_prompt_bytes", "null", "two_times"):
            if hasattr(net, name):
                setattr(self, name, getattr(net, name))

    def forward(self, x: Tensor, t: Tensor, y: Tensor | None = None, t_next: Tensor | None = None) -> Tensor:
        shape = (-1, *[1] * (x.dim() - 1))
        s = self.data_std
        variance = (t * s) ** 2 + (1 - t) ** 2
        c_in = variance.rsqrt()
        c_skip = (t * s**2 - (1 - t)) / variance
        more = () if t_next is None else (t_next,)  # networks with one time need not take it
        output = self.net(c_in.view(shape) * x, t, y, *more)
        return c_skip.view(shape) * x + (s * c_in).view(shape) * output.to(x.dtype)

    def encode(self, prompts: Sequence[str]) -> Any:
        return self.net.encode(prompts)  # type: ignore[operator]

    def encode_condition(self, y: Tensor) -> Any:
        """y itself where the network has no such method."""
        encode: Any = getattr(self.net, "encode_condition", None)
        return encode(y) if encode else y
