"""A network with the data needed to turn its predictions into velocities."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import KW_ONLY, dataclass, field
from typing import Any, Protocol

from torch import Tensor

from flow.path import LinearPath, Path
from flow.source import GAUSSIAN, GaussianSource, Source


class Network(Protocol):
    """What training and sampling need of a network; those of `models` have it all.

    A network with two times predicts the mean velocity from t to t_next, a flow map; t_next = None is t, the velocity.
    A network may also have `encode_condition(y)`: the part of its forward pass that depends on y alone. Where no gradients are
    recorded, sampling calls it once a batch and passes its result in the place of y.
    """

    num_classes: int | None  # for labels
    max_prompt_bytes: int | None  # for prompts, read as tokens
    null: int | None  # the y that stands for no condition
    two_times: bool

    def __call__(self, x: Tensor, t: Tensor, y: Tensor | None = None, t_next: Tensor | None = None) -> Tensor: ...

    def encode(self, prompts: Sequence[str]) -> Tensor: ...

    def eval(self) -> Any: ...


@dataclass
class FlowModel:
    """A network and the data needed to turn its predictions into velocities."""

    net: Network
    path: Path  # of its training
    shape: tuple[int, ...]  # of what the network sees: (C, H, W), or (2,) for points
    _: KW_ONLY
    prediction: str = "velocity"  # one of path.PREDICTIONS
    trained_guidance: float = 1.0  # the scale inside the velocity that a flow map learned (loss.args.guidance_scale)
    null_is_trained: bool = True  # labels or prompts were dropped in its training (flow.label_dropout above 0)
    decode: Callable[[Tensor], Tensor] | None = None  # of a flow on latents: from the end of the flow to images in [-1, 1]
    encode: Callable[[Tensor], Tensor] | None = None  # of the same flow: from such images to the data that it leads to
    guide: "FlowModel | None" = None  # a weaker model of the same data, for autoguidance (arXiv:2406.02507)
    source: Source = field(default_factory=GaussianSource)  # of x0
    coupling: str = "independent"  # of its training: flow.coupling

    def __post_init__(self):
        """Attributes that the network lacks get their defaults: no labels, no prompts, one time.

        Raises:
            ValueError: for two times or preconditioning on another path than the linear one, or with another prediction than
                the velocity.
        """
        set_defaults(self.net)
        if isinstance(self.path, LinearPath) and self.prediction == "velocity":
            return
        if self.net.two_times:
            raise ValueError("two_times=true: a flow map needs flow.path=linear and flow.prediction=velocity")
        if (data_std := getattr(self.net, "data_std", None)) is not None:
            raise ValueError(f"data_std={data_std}: preconditioning needs flow.path=linear and flow.prediction=velocity")

    @property
    def score_error(self) -> str | None:
        """Why the score does not follow from the velocity; None: it does."""
        return why_no_score(self.source.name, self.coupling)

    @property
    def networks(self) -> list[Any]:
        """Its own and that of the guide."""
        return [self.net, *(self.guide.networks if self.guide else [])]

    def draw_x0(self, stream: str, seed: int, positions: Iterable[int]) -> Tensor:
        """Samples of the source [n, *shape], float32, on the CPU; row i is a function of (stream, seed, positions[i])."""
        return self.source.draw(stream, seed, positions, self.shape)

    def eval(self) -> None:
        """Networks without dropout, as sampling wants them."""
        for net in self.networks:
            net.eval()


def set_defaults(net: Any) -> None:
    """Gives a network the attributes that it lacks: no labels, no prompts, one time.

    Raises ValueError for a network that reads prompts and lacks what prompts need.
    """
    if getattr(net, "max_prompt_bytes", None) and not (hasattr(net, "null") and hasattr(net, "encode")):
        raise ValueError(
            f"{type(net).__name__} has max_prompt_bytes: it needs encode(prompts), and null, the token of no prompt"
        )
    defaults = {"num_classes": None, "max_prompt_bytes": None, "null": getattr(net, "num_classes", None), "two_times": False}
    for name, value in defaults.items():
        if not hasattr(net, name):
            setattr(net, name, value)


def why_no_score(source: str, coupling: str) -> str | None:
    """Why a flow from this source, trained with this coupling, has a velocity that does not give the score, as Gaussian noise
    independent of the data does; None: it gives it."""
    if source != GAUSSIAN:
        return f"flow.source.name={source}: the flow does not start at Gaussian noise"
    return f"flow.coupling={coupling}: the noise depends on the data" if coupling != "independent" else None
