"""MeanFlow: a flow map from scratch, by the derivative of the network along the path."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from flow.losses.base import Batch, Eager, Losses
from flow.losses.flow_map import GuidedFlowMapLoss, x_and_velocity
from flow.path import broadcast_over

TANGENTS = ("path", "network")
DERIVATIVES = ("jvp", "difference")
JVP_PRECISIONS = ("no", "bf16")


@dataclass(kw_only=True)
class MeanFlow(GuidedFlowMapLoss):
    """u(x, t, s) regressed on sg[v + (s - t) du/dt], with du/dt along dx/dt = v at fixed s (Geng et al. 2025,
    arXiv:2505.13447, section 4.1).

    From (s - t) u = integral of v from t to s; its derivative in t is -u + (s - t) du/dt = -v. In the paper time runs the
    other way, which turns the sign of (s - t) du/dt. With tangent=network the derivative is taken along the network's own
    velocity u(x, t, t), which has no noise of single pairs, as in improved MeanFlow (Geng et al. 2025, arXiv:2512.02012;
    its regression of u - (s - t) sg[du/dt] on v has the same gradient). With derivative=difference du/dt is a central
    difference, two ordinary passes of the network in float32, as in Transition Models (Wang et al. 2025, arXiv:2509.04394).

    Example:
        >>> times = time_samplers.build("logit_normal")
        >>> loss = MeanFlow(path=LinearPath(), prediction="velocity", time_sampler=times, map_share=0.25)
        >>> loss(net, eager, batch).per_sample.mean().backward()
    """

    name: ClassVar[str] = "mean_flow"
    needs_derivative: ClassVar[bool] = True

    tangent: str = "path"  # path: v, or the guided one; network: u(x, t, t)
    derivative: str = "jvp"  # jvp: torch.func.jvp; difference: less exact, faster, for networks without one as well
    jvp_precision: str = "no"  # of du/dt by a jvp: no | bf16

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.jvp_precision is False:  # what YAML makes of no
            self.jvp_precision = "no"
        self.check("tangent", self.tangent in TANGENTS, f"one of {', '.join(TANGENTS)}")
        self.check("derivative", self.derivative in DERIVATIVES, f"one of {', '.join(DERIVATIVES)}")
        self.check("jvp_precision", self.jvp_precision in JVP_PRECISIONS, f"one of {', '.join(JVP_PRECISIONS)}")
        if self.derivative == "difference":
            self.check("jvp_precision", self.jvp_precision == "no", "no with derivative=difference, which rounding would drown")

    @property
    def passes(self) -> float:
        """The derivative counts as two passes: the network and its tangent, or the two ends of the difference."""
        return super().passes + self.guidance_passes + self.mean_map_share * (2 + (self.tangent == "network"))

    def __call__(self, net: Callable[..., Tensor], eager: Eager, batch: Batch) -> Losses:
        assert batch.uniforms is not None
        t, t_next = self.times(batch.uniforms, batch.progress)
        x, v = x_and_velocity(self.path, batch, t)
        prediction = net(x, t, batch.y, t_next)
        target = v = self.guided(eager, x, t, batch.y, v)
        rows = (t_next > t).nonzero()[:, 0]  # the others need no derivative, which costs more than the network
        if len(rows):
            x_r, t_r, s_r, v_r = x[rows], t[rows], t_next[rows], v[rows]
            y_r = None if batch.y is None else batch.y[rows]
            tangent = eager.as_trained(x_r, t_r, y_r, t_r) if self.tangent == "network" else v_r
            if self.derivative == "jvp":
                du_dt = eager.jvp(x_r, t_r, y_r, s_r, tangent, self.jvp_precision)
            else:
                du_dt = eager.difference(x_r, t_r, y_r, s_r, tangent)
            target = v.index_copy(0, rows, v_r + broadcast_over(s_r - t_r, du_dt) * du_dt)
        return self.weighted(prediction, target, t)
