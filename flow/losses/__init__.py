"""Training losses, a file each. A new file in this folder with a subclass of `FlowLoss` is a new choice of `loss.name`."""

import importlib
import inspect
import pkgutil
from collections.abc import Callable
from typing import Any

from torch import Tensor

from flow import registry
from flow.losses.base import LOSSES, Batch, Eager, FlowLoss, Loss, Losses
from flow.path import PREDICTIONS, Path

__all__ = ["LOSSES", "Batch", "Eager", "FlowLoss", "Loss", "Losses", "build"]

for module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{module.name}")

GIVEN = ("path", "prediction", "time_sampler")  # arguments that do not come from loss.args


def build(name: str, path: Path, prediction: str, time_sampler: Callable[[Tensor], Tensor], args: dict[str, Any]) -> FlowLoss:
    """The loss `name` on this path.

    prediction: what the network predicts, one of `flow.path.PREDICTIONS`. time_sampler: from uniforms to times, as
    `flow.time_samplers.build` makes it; the loss gets its times in float32, at most `path.t_max`. args: further arguments.

    Raises:
        ValueError: for an unknown name or argument, and for values that do not fit each other.
    """
    if name not in LOSSES:
        raise ValueError(f"unknown loss {name!r}; choose from {', '.join(LOSSES)}")
    if prediction not in PREDICTIONS:
        raise ValueError(f"unknown prediction {prediction!r}; choose from {', '.join(PREDICTIONS)}")
    allowed = {key: p for key, p in inspect.signature(LOSSES[name]).parameters.items() if key not in GIVEN}
    registry.check_arguments(name, args, allowed, _rule)

    def trained_times(u: Tensor) -> Tensor:
        return path.clip(time_sampler(u).float())

    try:
        return LOSSES[name](path=path, prediction=prediction, time_sampler=trained_times, **args)  # type: ignore[call-arg]
    except TypeError as error:  # a word where a number belongs
        raise ValueError(f"{name} cannot be built from {args}: {error}") from error


def _rule(parameter: inspect.Parameter, value: Any) -> str | None:
    """Numbers are finite where the annotation says so, and distance_args are arguments."""
    if parameter.annotation in (int, float, "int", "float"):
        return registry.finite_number(parameter, value)
    if parameter.name == "distance_args" and not isinstance(value, dict):
        return "arguments of the distance, as in {c: 0.01}"
    return None
