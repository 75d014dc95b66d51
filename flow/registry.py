"""Choices by name: a registry is a dict of functions, and a configuration names one with its arguments."""

import inspect
import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any


def pick(kind: str, registry: Mapping[str, Callable], name: str, args: dict[str, Any]) -> Callable:
    """registry[name] with `args` for those of its parameters whose default is a number or a string.

    Raises:
        ValueError: for an unknown name or argument, naming what exists, and for a value of another type than the default
            or a number that is not finite.
    """
    if name not in registry:
        raise ValueError(f"unknown {kind} {name!r}; choose from {', '.join(registry)}")
    parameters = inspect.signature(registry[name]).parameters.values()
    defaults = {p.name: p.default for p in parameters if isinstance(p.default, int | float | str)}
    for key, value in args.items():
        if key not in defaults:
            raise ValueError(f"{name} has no argument {key!r}; it takes {', '.join(defaults) or 'none'}")
        if isinstance(defaults[key], str):
            if not isinstance(value, str):
                raise ValueError(f"{key}={value!r}: must be a string")
        elif isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise ValueError(f"{key}={value!r}: must be a finite number")
    return partial(registry[name], **args)
