"""Write docs/configuration.md from the schema: `python -m scripts.dev.write_configuration`."""

import dataclasses
import inspect
import json
import re
import shlex
import typing
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

from configs import rectify, schema, vae
from datasets import DATASETS
from flow import couplings
from flow.losses import GIVEN, LOSSES
from flow.runtime import cli, files, messages
from flow.runtime.errors import cli_main
from flow.time_samplers import TIME_SAMPLERS
from models import MODELS

REPOSITORY = Path(__file__).parents[2]
PAGE = REPOSITORY / "docs/configuration.md"
INTRODUCTION = """\
# Configuration

A configuration starts from the defaults. The YAML file of `-c` overrides them, and `key=value` (also `--key value` and
`--key=value`) overrides both. An unknown key is an error that suggests the nearest one. Arguments (`data.args`,
`model.args`, ...) are checked against the signature of the function that takes them; a new name (`model.name=`,
`data.name=`, ...) on the command line starts from empty arguments: [their names and defaults](#arguments). Keys are fields of
dataclasses in `configs/`, from which `python -m scripts.dev.write_configuration` writes this page.
"""
ARGUMENTS = """\
## Arguments

The tables list arguments with their defaults; the file explains each. `flow.source.args` are those of `data.args`. Every
network also takes `data_std`, the standard deviation of the data, which scales its input and output
(`models/preconditioning.py`).
"""
REGISTRIES: tuple[tuple[str, Mapping[str, Callable], tuple[str, ...]], ...] = (  # key, choices, what is no argument
    ("model.args", MODELS, ("image_shape",)),
    ("loss.args", LOSSES, GIVEN),
    ("data.args", DATASETS, ("root",)),
    ("flow.time_sampler_args", TIME_SAMPLERS, ("u",)),
    ("flow.coupling_args", couplings.COUPLINGS, couplings.GIVEN),
)
SECTIONS: tuple[tuple[str, str, type], ...] = (
    ("Training a flow", "`train.py`, `configs/schema.py`", schema.Config),
    ("Training an autoencoder", "`scripts/train_vae.py`, `configs/vae.py`", vae.VaeConfig),
    ("Routes to few steps", "`scripts/rectify/`, `configs/rectify.py`", rectify.RectifyConfig),
)


def main() -> None:
    args = cli.Parser(__doc__, "  python -m scripts.dev.write_configuration").parse(takes_keys=False)
    files.write_text(PAGE, page())
    difference = f"git diff --stat {shlex.quote(str(PAGE))}"
    print(messages.summary(f"{PAGE}: every key", args.start, f"see what has changed with: {difference}"))


def page() -> str:
    """The text of docs/configuration.md."""
    parts = [INTRODUCTION]
    for title, source, config_class in SECTIONS:
        rows = [f"| `{key}` | `{default}` | {meaning} |" for key, default, meaning in keys(config_class)]
        parts.append("\n".join([f"## {title}\n\n{source}.\n\n| key | default | meaning |\n|---|---|---|", *rows]) + "\n")
    parts.append(ARGUMENTS)
    for key, choices, given in REGISTRIES:
        rows = [f"| `{name}` | {arguments(choice, given)} | {source_of(choice)} |" for name, choice in choices.items()]
        parts.append("\n".join([f"| name | `{key}` | file |\n|---|---|---|", *rows]) + "\n")
    return "\n".join(parts)


def arguments(choice: Callable, given: Collection[str]) -> str:
    """The arguments of a choice with their defaults, but for those that are `given`."""
    parameters = [p for name, p in inspect.signature(choice).parameters.items() if name not in given]
    words = [p.name if p.default is p.empty else f"{p.name}: {shown(p.default)}" for p in parameters]
    return ", ".join(f"`{word}`" for word in words)


def source_of(choice: Callable) -> str:
    """A link to the file of a choice."""
    path = Path(inspect.getfile(choice)).relative_to(REPOSITORY)
    return f"[{path}](../{path})"


def keys(config_class: type, prefix: str = "") -> list[tuple[str, str, str]]:
    """(dotted key, default as YAML, meaning) of every key."""
    defaults, comments = config_class(), comments_of(config_class)
    rows = []
    for field in dataclasses.fields(config_class):
        value = getattr(defaults, field.name)
        inside = next(filter(dataclasses.is_dataclass, (type(value), *typing.get_args(field.type))), None)
        if inside:  # a section, an optional one, or a dictionary of sections
            name = ".NAME" if isinstance(value, dict) else ""
            rows += keys(inside, f"{prefix}{field.name}{name}.")
        else:
            rows.append((prefix + field.name, shown(value), comments[field.name]))
    return rows


def comments_of(config_class: type) -> dict[str, str]:
    """The comment behind each field of a dataclass and its bases, which may span the lines of its call."""
    comments = {}
    name = ""
    sources = [inspect.getsource(base) for base in config_class.__mro__ if dataclasses.is_dataclass(base)]
    for line in "\n".join(sources).splitlines():
        if match := re.match(r"    (\w+): ", line):
            name = match.group(1)
        elif re.match(r"    \S", line) and not line.startswith("    )"):
            name = ""
        if name and (comment := re.search(r"  # (.+)$", line)):
            comments[name] = comment.group(1).replace(" | ", ", ")
    return comments


def shown(value: Any) -> str:
    """A default as a user would type it."""
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:_}"
    return f"{value:g}" if isinstance(value, float) else json.dumps(value)


if __name__ == "__main__":
    cli_main(main)
