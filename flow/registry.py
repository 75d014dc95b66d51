"""Registries: functions by name, chosen by a configuration with their arguments."""

import inspect
import sys
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any


def pick(kind: str, registry: Mapping[str, Callable], name: str, args: dict[str, Any]) -> Callable:
    """registry[name] with `args` for those of its parameters whose default is a number.

    Raises:
        ValueError: for an unknown name or argument, naming what exists, and for a value that is no finite number.
    """
    if name not in registry:
        raise ValueError(f"unknown {kind} {name!r}; choose from {', '.join(registry)}")
    parameters = inspect.signature(registry[name]).parameters.values()
    numbers = [p.name for p in parameters if isinstance(p.default, int | float)]
    for key, value in args.items():
        if key not in numbers:
            raise ValueError(f"{name} has no argument {key!r}; it takes {', '.join(numbers) or 'none'}")
        if not is_finite_number(value):
            raise ValueError(f"{key}={value!r}: must be a finite number")
    return partial(registry[name], **args)


def is_finite_number(value: Any) -> bool:
    """Whether the value is an int or a float, no bool, within the range of a float."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max
