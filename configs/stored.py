"""Stored configurations, which keep ${oc.env:...} as it was typed: no value of the environment is written or looked up.

A stored configuration travels, in the header of a snapshot or in a run folder. What an interpolation such as ${oc.env:HOME}
stands for belongs to the machine, so it is written as it was typed, and nothing resolves it where the file is read.
"""

import dataclasses
import functools
import re
from collections.abc import Callable, Iterator
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf

from configs.errors import first_line

Place = tuple[Any, ...]  # the keys that lead to a value
MAX_CHARACTERS = 2**20  # of a stored configuration; usual ones have about 2,000

_RESOLVER = re.compile(r"\$\{[^{}]*:")  # ${oc.env:HOME}; ${seed} is none
_MARK = "⟨environment⟩"


def leaves(tree: Any, place: Place = ()) -> Iterator[tuple[Place, Any]]:
    """The values of nested dicts that are no dicts themselves."""
    if not isinstance(tree, dict):
        yield place, tree
        return
    for key, value in tree.items():
        yield from leaves(value, (*place, key))


def value_at(tree: Any, place: Place) -> Any:
    """The value in nested dicts that these keys lead to, None where there is none."""
    return functools.reduce(lambda branch, key: branch.get(key) if isinstance(branch, dict) else None, place, tree)


def dotted(place: Place) -> str:
    """The key of an override: data.args.path."""
    return ".".join(map(str, place))


def typed_interpolations(config: DictConfig) -> dict[Place, Any]:
    """The values whose text comes from the environment or another resolver, as they were typed.

    References to other keys, ${seed}, are not among them, nor single numbers: those are stored, a run is reproduced by them.
    """
    raw = OmegaConf.to_container(config)
    if not any(_is_interpolation(value) for _, value in leaves(raw)):
        return {}
    values: Any = OmegaConf.to_container(config, resolve=True)
    marked = OmegaConf.create(_map_text(raw, lambda text: _MARK if _RESOLVER.search(text) else text))
    marks: Any = OmegaConf.to_container(marked, resolve=True)
    return {
        place: value
        for place, value in leaves(raw)
        if _MARK in str(value_at(marks, place)) and not isinstance(value_at(values, place), bool | int | float)
    }


def restore(tree: Any, typed: dict[Place, Any]) -> Any:
    """The nested dict with these values as they were typed."""
    for place, value in typed.items():
        branch = tree
        for key in place[:-1]:
            branch = branch.setdefault(key, {})
        branch[place[-1]] = value
    return tree


def read(text: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """(the nested dict without its interpolations, the interpolations by their dotted keys).

    Raises ValueError where the text is not YAML of `key: value` lines, and for aliases: with them a few lines make gigabytes.
    """
    if len(text) > MAX_CHARACTERS:
        raise ValueError(f"has {len(text):,} characters, a configuration has at most {MAX_CHARACTERS:,}")
    try:
        aliases = "*" in text and any(isinstance(event, yaml.AliasEvent) for event in yaml.parse(text, yaml.SafeLoader))
        tree: Any = {} if aliases else OmegaConf.to_container(OmegaConf.create(text))
    except Exception as error:  # yaml.YAMLError, OmegaConf's own
        raise ValueError(f"not YAML ({yaml_problem(error)})") from None
    if aliases:
        raise ValueError("holds YAML aliases (*name), which no stored configuration has")
    if not isinstance(tree, dict) or not tree:
        raise ValueError("holds no `key: value` lines")
    interpolations = {place: value for place, value in leaves(tree) if _is_interpolation(value)}
    for place in interpolations:
        del value_at(tree, place[:-1])[place[-1]]
    return tree, {dotted(place): value for place, value in interpolations.items()}


def refusal(key: str, value: Any) -> str:
    """What to do about an interpolation in a stored configuration, in a line."""
    return f"{key}={value}: a stored configuration resolves nothing; give {key}=... on the command line"


def typed_overrides(config: Any) -> list[str]:
    """`key=value` for each value of a configuration that is stored as it was typed."""
    return [f"{dotted(place)}={value}" for place, value in getattr(config, "typed", {}).items()]


def typed_values(config: Any) -> dict[str, Any]:
    """{dotted key: the value that it stands for here} of the same."""
    tree = dataclasses.asdict(config)
    return {dotted(place): value_at(tree, place) for place in getattr(config, "typed", {})}


def unwritable(values: dict[Place, Any]) -> Iterator[tuple[str, Any]]:
    """(key, value) where text has a NUL, which ends file names, or half of a surrogate pair, which UTF-8 does not have."""
    for place, value in values.items():
        if any(c == "\0" or "\ud800" <= c <= "\udfff" for text in _texts(value) for c in text):
            yield dotted(place), value


def yaml_problem(error: Exception) -> str:
    """What is wrong, in one line: with the line of the file where the parser says it."""
    if isinstance(error, yaml.MarkedYAMLError) and error.problem and error.problem_mark:
        return f"{error.problem}, line {error.problem_mark.line + 1}"
    return first_line(error)


def _is_interpolation(value: Any) -> bool:
    return isinstance(value, str | list) and "${" in str(value)


def _texts(value: Any) -> list[str]:
    """The strings in nested lists and dicts."""
    if isinstance(value, dict | list):
        return [text for part in (value.values() if isinstance(value, dict) else value) for text in _texts(part)]
    return [value] if isinstance(value, str) else []


def _map_text(tree: Any, change: Callable[[str], str]) -> Any:
    if isinstance(tree, dict):
        return {key: _map_text(value, change) for key, value in tree.items()}
    if isinstance(tree, list):
        return [_map_text(value, change) for value in tree]
    return change(tree) if isinstance(tree, str) else tree
