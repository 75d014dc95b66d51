"""Trackers: those of Accelerate by name and those of the project; the configuration, pictures and tables in each of them.

Each tracker shows pictures and tables by an API of its own. Rows of numbers need none: Accelerate sends those.
"""

import dataclasses
import functools
import importlib
import os
import re
import secrets
from operator import getitem
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.tracking import GeneralTracker, TensorBoardTracker
from torch import Tensor

from configs import keys, stored
from flow.runtime import files

PROJECT = "flow-matching"  # the project of all runs, in trackers that have projects
# Trackers beside those that Accelerate knows; they are called with the run folder.
TRACKERS: dict[str, type[GeneralTracker]] = {}
# In a run folder: what trackio and wandb call the run, under which it goes on when it is resumed.
TRACKIO_NAME, WANDB_ID = "trackio_name.txt", "wandb_id.txt"
ONE_IMAGE = ("aim", "clearml")  # whose log_images takes an array for a name where others take a list


def start(accelerator: Accelerator, folder: Path, config: Any, first_step: int) -> None:
    """Start the trackers of train.log_with for the run in `folder`, which resumes after `first_step`, with its configuration.

    All processes must call it.
    """
    if not config.train.log_with:
        return
    # As in config.yaml, without values of the environment: some trackers send them elsewhere.
    tree = stored.restore(dataclasses.asdict(config), getattr(config, "typed", {}))
    flat = {key: _to_scalar(functools.reduce(getitem, key.split("."), tree)) for key in keys.all_keys(type(config))}
    names = [str(tracker) for tracker in accelerator.log_with]
    # TensorBoard takes the name of its folder where others take the name of the project.
    known = [
        TensorBoardTracker("tensorboard", folder, purge_step=first_step + 1) if name == "tensorboard" else tracker
        for name, tracker in zip(names, accelerator.log_with, strict=True)
    ]
    accelerator.log_with = [*known, *(TRACKERS[name](folder) for name in config.train.log_with if name in TRACKERS)]
    trackio_name, wandb_id = folder.name, None
    if "trackio" in names and accelerator.is_main_process:
        trackio_name = _name_to_resume(folder / TRACKIO_NAME, first_step) or folder.name
    # Offline a resumed run is one of its own: synchronized under the same id, it would replace the first part of the run.
    alone = first_step and os.environ.get("WANDB_MODE") == "offline"
    if "wandb" in names and accelerator.is_main_process and not alone:
        wandb_id = _name_to_resume(folder / WANDB_ID, first_step)
    settings = {
        "wandb": {"name": folder.name, "dir": str(folder), **({"id": wandb_id, "resume": "allow"} if wandb_id else {})},
        "trackio": {"name": trackio_name, "resume": "allow" if first_step else "never", "embed": False},
        "aim": {"experiment": PROJECT},
        "mlflow": {"run_name": folder.name},
    }
    with files.naming(folder / "tensorboard"):
        accelerator.init_trackers(PROJECT, config=flat, init_kwargs=settings)
    for tracker in accelerator.trackers:
        if tracker.name == "aim" and accelerator.is_main_process:
            tracker.writer.name = folder.name


def log_image(accelerator: Accelerator, name: str, step: int, picture: Tensor) -> None:
    """A picture uint8 [1 or 3, H, W] to the trackers that show images, as RGB; on the main process."""
    pixels = picture.expand(3, -1, -1).permute(1, 2, 0).numpy()
    for tracker in accelerator.trackers:
        if tracker.name == "tensorboard":
            tracker.writer.add_image(name, pixels, global_step=step, dataformats="HWC")
        elif tracker.name == "trackio":
            tracker.log({name: importlib.import_module("trackio").Image(pixels)}, step=step)
        elif hasattr(tracker, "log_images"):
            tracker.log_images({name: pixels if tracker.name in ONE_IMAGE else [pixels]}, step=step)


def log_table(accelerator: Accelerator, name: str, step: int, lines: list[list[str]], text: str) -> None:
    """A table to the trackers that show tables or text; on the main process.

    Args:
        lines: the names of the columns, then the rows.
        text: the same as Markdown.
    """
    columns, *rows = lines
    for tracker in accelerator.trackers:
        if tracker.name == "tensorboard":
            tracker.writer.add_text(name, text, global_step=step)
        elif tracker.name == "trackio":
            tracker.log({name: importlib.import_module("trackio").Table(columns=columns, data=rows)}, step=step)
        elif tracker.name == "aim":
            tracker.writer.track(importlib.import_module("aim").Text(text), name=name, step=step)
        elif hasattr(tracker, "log_table"):
            tracker.log_table(name, columns=columns, data=rows, step=step)


def _to_scalar(value: object) -> int | float | str | bool:
    return value if isinstance(value, int | float | str | bool) else str(value)


def _name_to_resume(file: Path, first_step: int) -> str | None:
    """The name by which a tracker resumes this run, in `file`. A first start makes it from the run folder and random letters,
    as runs in other folders may have the same name; a resumed run reads it, None where an earlier version stored none."""
    if first_step:
        return file.read_text(encoding="utf-8") if file.is_file() else None
    allowed = re.sub(r"[^\w.=-]", "_", file.parent.name)  # in an id of wandb
    name = f"{allowed}-{secrets.token_hex(3)}"
    files.write_text(file, name)
    return name
