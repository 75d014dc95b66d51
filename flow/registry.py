"""Registries: functions by name, chosen by a configuration with their arguments."""

import inspect
import sys
from collections.abc import Callable, Mapping
from functools import partial
from os import PathLike
from typing import Any, TypeVar

Entry = TypeVar("Entry")

# (argument of a function, value) -> None where the value is allowed, else what it must be
Rule = Callable[[inspect.Parameter, Any], str | None]


def check_arguments(name: str, args: Mapping[str, Any], allowed: Mapping[str, inspect.Parameter], rule: Rule) -> None:
    """Raises ValueError for an argument of `name` that is not `allowed`, naming those that are, and for a value that breaks the
    rule."""
    for key, value in args.items():
        if key not in allowed:
            raise ValueError(f"{name} has no argument {key!r}; it takes {', '.join(allowed) or 'none'}")
        if expected := rule(allowed[key], value):
            raise ValueError(f"{key}={value!r}: must be {expected}")


def bool_where_declared(parameter: inspect.Parameter, value: Any) -> str | None:
    """The rule that an argument is true or false where its annotation is bool, and only there."""
    truth = parameter.annotation in (bool, "bool")
    if isinstance(value, bool) == truth:
        return None
    return "true or false" if truth else "something else than true or false"


def text_where_declared(parameter: inspect.Parameter, value: Any) -> str | None:
    """The rule that an argument is text, or a path, where its annotation is str, or str | None."""
    optional = parameter.annotation in (str | None, "str | None")
    if (
        isinstance(value, str | PathLike)
        or (value is None and optional)
        or not (optional or parameter.annotation in (str, "str"))
    ):
        return None
    if not isinstance(value, int | float):
        return "text"
    # YAML reads a folder 2024 as a number, 2024.10 as 2024.1 and `no` as false: what was typed is not known any more
    typed = "..." if isinstance(value, bool) else value
    return f"text; write {parameter.name}='\"{typed}\"' with both quotes, for YAML to read it as text"


def finite_number(parameter: inspect.Parameter, value: Any) -> str | None:
    """The rule that every argument is a finite number."""
    return None if is_finite_number(value) else "a finite number"


def like_its_default(parameter: inspect.Parameter, value: Any) -> str | None:
    """The rule that an argument is true or false where its default is, else a finite number."""
    if isinstance(parameter.default, bool):
        return None if isinstance(value, bool) else "true or false"
    return finite_number(parameter, value)


def find(kind: str, registry: Mapping[str, Entry], name: str) -> Entry:
    """registry[name]. Raises ValueError for an unknown name, naming what exists."""
    if name not in registry:
        raise ValueError(f"unknown {kind} {name!r}; choose from {', '.join(registry)}")
    return registry[name]


def pick(kind: str, registry: Mapping[str, Callable], name: str, args: dict[str, Any]) -> Callable:
    """registry[name] with `args` for those of its parameters whose default is a number, true or false.

    Raises:
        ValueError: for an unknown name or argument, naming what exists, and for a value that breaks `like_its_default`.
    """
    choice = find(kind, registry, name)
    parameters = inspect.signature(choice).parameters
    allowed = {key: p for key, p in parameters.items() if isinstance(p.default, int | float)}  # bool is an int
    check_arguments(name, args, allowed, like_its_default)
    return partial(choice, **args)


def is_finite_number(value: Any) -> bool:
    """Whether the value is an int or a float, no bool, within the range of a float."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max


def kind_of(value: Any) -> str:
    """The type of a value with an article, for a message: 'a list', 'a numpy.ndarray'; 'None'."""
    kind = type(value)
    name = kind.__name__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__name__}"
    return "None" if value is None else f"{'an' if name[0] in 'aeiou' else 'a'} {name}"
