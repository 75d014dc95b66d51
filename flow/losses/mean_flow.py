"""MeanFlow: a flow map from nothing, by the derivative of the network along the path."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from flow.losses.base import Batch, Eager, Losses
from flow.losses.flow_map import FlowMapLoss, jump, x_and_velocity

TANGENTS = ("path", "network")
JVP_PRECISIONS = ("no", "bf16")


@dataclass(kw_only=True)
class MeanFlow(FlowMapLoss):
    """u(x, t, s) regressed on sg[v + (s - t) du/dt], with du/dt along dx/dt = v at fixed s (Geng et al. 2025,
    arXiv:2505.13447, section 4.1).

    From (s - t) u = integral of v from t to s; its derivative in t is -u + (s - t) du/dt = -v. In the paper time runs the
    other way, which turns the sign of (s - t) du/dt. With tangent=network the derivative is taken along the network's own
    velocity u(x, t, t), which has no noise of single pairs, as in improved MeanFlow (Geng et al. 2025, arXiv:2512.02012;
    its regression of u - (s - t) sg[du/dt] on v has the same gradient).

    Example:
        >>> loss = MeanFlow(LinearPath(), "velocity", time_samplers.build("logit_normal"), map_share=0.25)
        >>> loss(net, eager, batch).per_sample.mean().backward()
    """

    name: ClassVar[str] = "mean_flow"
    needs_jvp: ClassVar[bool] = True

    tangent: str = "path"  # path: v, or the guided one; network: u(x, t, t)
    jvp_precision: str = "no"  # of du/dt: no | bf16

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check("tangent", self.tangent in TANGENTS, f"one of {', '.join(TANGENTS)}")
        self.check("jvp_precision", self.jvp_precision in JVP_PRECISIONS, f"one of {', '.join(JVP_PRECISIONS)}")

    @property
    def passes(self) -> float:  # type: ignore[override]
        """Of a sample; the derivative counts as two, as it takes the network and its tangent forward."""
        return 3 + self.guidance_passes + self.map_share * (2 + (self.tangent == "network"))

    def __call__(self, net: Callable[..., Tensor], eager: Eager, batch: Batch) -> Losses:
        assert batch.u is not None
        t, t_next = self.times(batch.u)
        x, v = x_and_velocity(self.path, batch, t)
        prediction = net(x, t, batch.y, t_next)
        target = v = self.guided(eager, x, t, batch.y, v)
        if len(rows := (t_next > t).nonzero()[:, 0]):  # the derivative costs more than the network, so only where it counts
            at = x[rows], t[rows], None if batch.y is None else batch.y[rows]
            tangent = eager(*at, at[1]) if self.tangent == "network" else v[rows]
            du_dt = eager.jvp(*at, t_next[rows], tangent, self.jvp_precision)[1]
            target = v.index_copy(0, rows, jump(v[rows], t[rows], t_next[rows], du_dt))
        return self.weighted(prediction, target, t)
