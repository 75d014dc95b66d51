"""Choices by name: a registry is a dict of functions, and a configuration names one and gives its numbers."""

import inspect
import math
from collections.abc import Callable
from functools import partial
from typing import Any


def pick(what: str, registry: dict[str, Callable], name: str, args: dict[str, Any]) -> Callable:
    """registry[name] with the numbers `args` for those of its parameters whose default is a number.

    Raises ValueError for an unknown name or argument, naming what exists, and for a value that is no finite number.
    """
    if name not in registry:
        raise ValueError(f"{name!r} is no {what}; choose one of {', '.join(registry)}")
    parameters = inspect.signature(registry[name]).parameters.values()
    known = [p.name for p in parameters if isinstance(p.default, int | float)]
    for key, value in args.items():
        if key not in known:
            raise ValueError(f"{name} has no argument {key!r}; it takes {', '.join(known) or 'none'}")
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise ValueError(f"{key}={value!r}: must be a finite number")
    return partial(registry[name], **args)
