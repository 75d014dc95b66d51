"""Dotted keys of a configuration, and the limits of their values."""

import contextlib
import dataclasses
import functools
import math
from collections.abc import Callable
from dataclasses import field
from typing import Any

from configs.errors import UserError


def limited(default: Any, **limits: Any) -> Any:
    """A field with its limits as metadata: `min`, `above`, `fraction` or `choices`; see `check_limits`."""
    return field(default=default, metadata=limits)


def check(config: Any, key: str, holds: Callable[[Any], object], rule: str) -> None:
    """Raises UserError with the key, its value and the rule where the value does not hold."""
    value = get(config, key)
    with contextlib.suppress(TypeError):  # e.g. a section among the numbers of a list
        if holds(value):
            return
    raise UserError(f"{key}={value}: must be {rule}")


def check_limits(config: Any, prefix: str = "", section: Any = None) -> None:
    """Check every field against its metadata. Raises UserError."""
    section = config if section is None else section
    for f in dataclasses.fields(section):
        key, value = f"{prefix}{f.name}", getattr(section, f.name)
        for name, inner in value.items() if isinstance(value, dict) else [("", value)]:
            if dataclasses.is_dataclass(inner):
                check_limits(config, f"{key}.{name}." if name else f"{key}.", inner)
        for kind, limit in f.metadata.items():
            check(config, key, *_RULES[kind](limit))


_RULES: dict[str, Callable[[Any], tuple[Callable[[Any], bool], str]]] = {  # limit -> (whether a value holds, in words)
    "min": lambda low: (lambda v: low <= v < math.inf, f"at least {low}" if low else "0 or more, and finite"),
    "above": lambda low: (lambda v: low < v < math.inf, f"greater than {low}, and finite"),
    "fraction": lambda _: (lambda v: 0 <= v <= 1, "between 0 and 1"),
    "choices": lambda choices: (lambda v: v in choices, f"one of {', '.join(choices)}"),
}


def all_keys(config_class: type, prefix: str = "") -> list[str]:
    """All dotted keys: ['seed', 'data.name', ...]."""
    keys = []
    for f in dataclasses.fields(config_class):
        kind: Any = f.type
        nested = dataclasses.is_dataclass(f.type)
        keys += all_keys(kind, f"{prefix}{f.name}.") if nested else [prefix + f.name]
    return keys


def get(config: Any, key: str) -> Any:
    """The value of a dotted key."""
    return functools.reduce(
        lambda node, name: node[name] if isinstance(node, dict) else getattr(node, name), key.split("."), config
    )
