"""How a configuration is loaded, checked and written.

It is the defaults of a dataclass such as `schema.Config`, then a YAML file, then `key=value` overrides, merged by OmegaConf.
"""

import contextlib
import dataclasses
import functools
import hashlib
import json
import os
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from configs import stored
from configs.errors import UserError, did_you_mean, first_line
from configs.keys import all_keys, get
from configs.schema import Config

_ARGS_OF = {  # a name and its arguments; those of another name mean nothing to it
    "data.name": "data.args", "model.name": "model.args", "flow.coupling": "flow.coupling_args",
    "flow.source.name": "flow.source.args",
    "flow.time_sampler": "flow.time_sampler_args", "loss.name": "loss.args",
}  # fmt: skip


def load(path: str | Path | None = None, overrides: list[str] | None = None, base: Any = None, kind: Any = Config) -> Any:
    """Defaults of `kind` (or `base`), then the YAML file at `path`, then `key=value` overrides; checked.

    An override that names another network, data set, coupling, loss or time sampler starts from empty arguments,
    whatever the order of the overrides. Interpolations (${oc.env:HOME}) are resolved.

    Raises UserError that names the key, the value and what would be right.
    """
    defaults = OmegaConf.structured(base) if base else _defaults(kind)
    config = _merge(defaults, _read_yaml(Path(path), kind) if path is not None else OmegaConf.create(), source=str(path))
    nodes = [_read_override(override, kind) for override in overrides or []]
    typed = [_leaves(node) for node in nodes]
    for name, args in _ARGS_OF.items():
        names = [leaves[name] for leaves in typed if leaves.get(name)]
        if names and names[-1] != OmegaConf.select(config, name):
            OmegaConf.update(config, args, {}, merge=False)
    if nodes:
        try:
            config = _merge(config, *nodes, source="")
        except UserError:  # again one by one, for the error to name the override
            for override, node in zip(overrides or [], nodes, strict=True):
                config = _merge(config, node, source=override)
    return _finished(config)


def parse(text: str, source: str = "stored config", kind: Any = Config, confirmed: dict[str, Any] | None = None) -> Any:
    """The configuration that `dump` wrote (the header of a snapshot, the config.yaml of a run). Interpolations are refused but
    for those of keys that are `confirmed`, whose values are taken from there (see `overridden`).

    Raises UserError that names the source where it is not one.
    """
    config, interpolations = parse_parts(text, source, kind, confirmed)
    if interpolations:
        raise UserError(f"{source}: {stored.refusal(*next(iter(interpolations.items())))}")
    return config


def parse_parts(text: str, source: str, kind: Any, confirmed: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
    """As `parse`, with the interpolations that nobody confirmed beside it: {key: as typed}; their keys have defaults."""
    try:
        tree, interpolations = stored.read(text)
    except ValueError as error:
        raise UserError(f"{source}: {error}") from None
    config: Any = _merge(_defaults(kind), OmegaConf.create(tree), source=source)
    for key in interpolations.keys() & (confirmed or {}).keys():
        OmegaConf.update(node := OmegaConf.create({}), key, (confirmed or {})[key])
        config = _merge(config, node, source=key)
        del interpolations[key]
    return _finished(config), interpolations


@functools.cache
def _defaults(kind: type) -> DictConfig:
    """The defaults of a configuration class, to merge with; merging copies them."""
    return OmegaConf.structured(kind)


def overridden(overrides: list[str] | None, kind: type = Config) -> dict[str, Any]:
    """{dotted key: value as typed} of what the overrides set."""
    return {key: value for override in overrides or [] for key, value in _leaves(_read_override(override, kind)).items()}


def dump(config: Any) -> str:
    """The whole configuration as YAML. Text from the environment stays as it was typed: ${oc.env:HOME}."""
    return OmegaConf.to_yaml(OmegaConf.create(stored.restore(dataclasses.asdict(config), getattr(config, "typed", {}))))


def digest(config: Any) -> str:
    """A hash of the values of a configuration that are not defaults; further keys of later versions do not change it."""
    own, default = (dict(stored.leaves(dataclasses.asdict(c))) for c in (config, type(config)()))
    absent = "(absent)"
    pairs = {stored.dotted(place): (own.get(place, absent), default.get(place, absent)) for place in own | default}
    changed = {key: value for key, (value, usual) in pairs.items() if value != usual}
    return hashlib.sha256(json.dumps(changed, sort_keys=True, default=str).encode()).hexdigest()[:16]


def _read_yaml(path: Path, kind: type) -> DictConfig:
    if not path.is_file():
        candidates = sorted(str(p) for p in path.parent.glob("*.yaml")) if path.parent.is_dir() else []
        raise UserError(f"-c {path}: there is no such file.{did_you_mean(str(path), candidates)}")
    try:
        node = OmegaConf.load(path)
    except Exception as error:  # yaml.YAMLError, UnicodeDecodeError, OmegaConf's own
        raise UserError(f"-c {path}: not a YAML file ({stored.yaml_problem(error)})") from None
    if not isinstance(node, DictConfig):
        raise UserError(f"-c {path}: holds a list, expected `key: value` lines")
    for key in _leaves(node):
        _check_key(key, str(path), kind)
    return node


def _read_override(override: str, kind: type) -> DictConfig:
    key, _, value = override.partition("=")
    _check_key(key, override, kind)
    try:
        return OmegaConf.from_dotlist([override])
    except Exception as error:  # OmegaConf lets the errors of the YAML scanner through
        raise UserError(f"{override}: the value {value!r} is not YAML ({stored.yaml_problem(error)})") from None


def _leaves(node: DictConfig) -> dict[str, Any]:
    """{dotted key: value as typed}."""
    return {stored.dotted(place): value for place, value in stored.leaves(OmegaConf.to_container(node))}


def _finished(node: DictConfig) -> Any:
    """The checked dataclass of a merged configuration; it remembers what `dump` must not resolve. ~ is the home folder."""
    tree = OmegaConf.to_container(node)
    for place, value in stored.leaves(tree):
        if isinstance(value, str) and value.startswith("~/"):
            OmegaConf.update(node, stored.dotted(place), os.path.expanduser(value), merge=False)
    try:
        config: Any = OmegaConf.to_object(node)
        values = dict(stored.leaves(dataclasses.asdict(config)))
        if any(map(_is_nested, values.values())):
            OmegaConf.structured(config)  # merging does not check lists and dictionaries in lists; this takes 20 ms
    except OmegaConfBaseException as error:
        typed = next((value for place, value in stored.leaves(tree) if stored.dotted(place) == str(error.full_key)), None)
        raise UserError(_problem(error, f"{error.full_key}={typed}" if isinstance(typed, str) else "")) from None
    for key, value in stored.unwritable(values):
        raise UserError(f"{key}={value!r}: holds a character that no file name and no text can have")
    config.typed = stored.typed_interpolations(node)
    config.validate()
    for place, value in values.items():  # of free arguments
        if value != value:
            raise UserError(f"{stored.dotted(place)}=nan: must be a number")
    return config


def _is_nested(value: Any) -> bool:
    return isinstance(value, list) and any(isinstance(element, list | dict) for element in value)


def _check_key(key: str, source: str, kind: type) -> None:
    keys = all_keys(kind)
    if key in keys:
        return
    inside = next((k for k in keys if key.startswith(f"{k}.")), None)  # of a key that holds a dictionary, e.g. model.args
    if inside and isinstance(get(kind(), inside), dict):
        return
    if inner := [k for k in keys if k.startswith(f"{key}.")]:
        raise UserError(f"{source}: {key!r} is a section; set one of {', '.join(inner)}")
    raise UserError(f"{source}: unknown key {key!r}.{did_you_mean(key, keys)}")


def _merge(config: DictConfig, *nodes: Any, source: str) -> DictConfig:
    """Keys and types are checked, interpolations are not resolved."""
    try:
        values = [(node, place, value) for node in nodes for place, value in stored.leaves(OmegaConf.to_container(node))]
        tree = OmegaConf.to_container(config) if any(isinstance(value, list) for _, _, value in values) else {}
        for node, place, value in values:
            key = stored.dotted(place)
            if isinstance(value, list) and isinstance(stored.value_at(tree, place), dict):
                where = f"{source}: " if not source.startswith(key) else ""
                raise UserError(f"{where}{key}={value}: must be a dictionary; write {{name: value}}")
            if value is False and key in ("train.mixed_precision", "train.ddp_comm_hook"):
                OmegaConf.update(node, key, "no")  # YAML reads no as False
        merged: Any = OmegaConf.merge(config, *nodes)
        return merged
    except (OverflowError, TypeError) as error:  # a number of hundreds of digits; a list in place of a section
        raise UserError(f"{source[:60]}: {first_line(error)}") from None
    except OmegaConfBaseException as error:
        raise UserError(_problem(error, source)) from None


def _problem(error: OmegaConfBaseException, source: str) -> str:
    """What is wrong, in a line: the source, the key where the source does not begin with it, and what would be right."""
    hint = ""
    key = "" if not error.full_key or source.startswith(str(error.full_key)) else f"{error.full_key}: "
    where = f"{source}: {key}" if source else key
    if "is not a ListConfig" in str(error):
        return f"{where}must be a list; write {_as_list(error.value)}"
    if "Integer" in str(error) and isinstance(error.value, (float, str)):
        with contextlib.suppress(ValueError):
            hint = f"; write {int(float(error.value)):_}" if float(error.value).is_integer() else ""
    return f"{where}{first_line(error)}{hint}"


def _as_list(value: Any) -> str:
    """How a value is written as a list: in brackets, and empty for `none`."""
    text = str(value).strip().removeprefix("(").removesuffix(")")
    parts = [part.strip() for part in text.split(",") if part.strip()]
    return "[]" if [part.lower() for part in parts] in (["none"], ["null"], ["false"]) else f"[{', '.join(parts)}]"
