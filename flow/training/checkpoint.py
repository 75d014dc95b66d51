"""Checkpoints: everything that resuming needs, whole or absent, the last few retained.

`checkpoints/step_00010000/` holds what accelerate saves (network, optimizer, loss scale), the moving averages as
snapshots, `state.json` and `manifest.json` with the size and SHA-256 of each file. Random states are not among it:
nothing random is carried in a state. `latest` is found by looking, not stored.
"""

import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from accelerate import Accelerator
from safetensors import SafetensorError, safe_open

from configs import loading
from configs.errors import UserError, first_line
from configs.schema import Kind
from flow.runtime import distributed, files, step_names
from flow.sampling import grid_store, header, posthoc_ema
from flow.sampling.locate import EMA_FILE

# Beginnings of the names of what every checkpoint holds; accelerate has several for the weights and the optimizer's state.
_NEEDED = (("model", "pytorch_model"), ("optimizer",), (EMA_FILE,), ("state.json",))
_READING_ERRORS = (OSError, RuntimeError, ValueError, LookupError, TypeError, AttributeError, EOFError, SafetensorError)


def save(accelerator: Accelerator, folder: Path, step: int, state: dict, write_more: Callable[[Path], None]) -> Path:
    """Write `folder/step_XXXXXXXX`; all processes call it. `write_more(path)` adds files on the main process.

    Raises UserError on every process where writing fails on one; what was saved before stays as it was.
    """
    path = folder / step_names.name_of(step)
    temporary = folder / f"{files.TEMPORARY}{path.name}"
    with _writing(accelerator, path):
        if accelerator.is_main_process:
            folder.mkdir(parents=True, exist_ok=True)
            files.clean_temporaries(folder)
            temporary.mkdir()
    with _writing(accelerator, path):
        accelerator.save_state(str(temporary))
    with _writing(accelerator, path):
        if accelerator.is_main_process:
            for random_state in temporary.glob("random_states_*"):
                random_state.unlink()
            write_more(temporary)
            (temporary / "state.json").write_text(json.dumps({"step": step, **state}))
            written = sorted(p for p in temporary.rglob("*") if p.is_file())
            entries = {
                p.relative_to(temporary).as_posix(): {"bytes": p.stat().st_size, "sha256": files.sha256(p)} for p in written
            }
            (temporary / "manifest.json").write_text(json.dumps(entries, indent=1))
            files.atomic_rename_dir(temporary, path)
    return path


def prune(folder: Path, keep: int) -> None:
    """Delete all but the last `keep` checkpoints; 0 keeps all."""
    for path in list_checkpoints(folder)[:-keep] if keep else []:
        trash = path.with_name(f"{files.TEMPORARY}{path.name}")  # so that half a deletion is no checkpoint
        path.rename(trash)
        shutil.rmtree(trash, ignore_errors=True)


def load(accelerator: Accelerator, path: Path) -> dict:
    """Restore what accelerate saved; returns the state given to `save`, with the step."""
    with reading(path):
        if accelerator.scaler is not None and not (path / "scaler.pt").exists():
            reason = f"{path} has no loss scale, as it was trained in another precision"
            raise UserError(f"train.mixed_precision=fp16: {reason}; resume with the precision of the run")
        accelerator.load_state(str(path))
        state = files.read_json(path / "state.json")
        if state["step"] != step_names.step_of(path) or not isinstance(state["updates"], int):
            raise ValueError(f"state.json is of step {state['step']}, with {state['updates']} updates")
        return state


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """What goes wrong while the content of a checkpoint is taken over becomes a UserError that names the checkpoint."""
    try:
        yield
    except (UserError, torch.OutOfMemoryError, torch.distributed.DistError):  # the latter two are RuntimeErrors
        raise
    except UnpicklingError:
        raise UserError(f"-r {path}: holds something other than tensors and numbers, which is not loaded") from None
    except _READING_ERRORS as error:
        first, *more = [line.strip() for line in str(error).splitlines()] or [""]
        reason = f"{first} {more[0]}" if first.endswith(":") and more else first_line(error)  # torch names the weight in line 2
        raise UserError(f"-r {path}: does not fit this configuration ({type(error).__name__}: {reason})") from None


def stored_config(path: Path, kind: type[Kind], confirmed: dict[str, Any]) -> Kind:
    """The configuration that a checkpoint was written with. `confirmed`: {key: value} of what the user's own configuration
    reads from the environment. Raises UserError."""
    with reading(path), safe_open(path / EMA_FILE, framework="pt") as file:
        text = file.metadata()["config"]
    return loading.parse(text, f"-r {path / EMA_FILE}", kind, confirmed)


def stored_class_names(path: Path) -> tuple[str, ...]:
    """The classes that a checkpoint was trained with, () without labels. Raises UserError."""
    with reading(path), safe_open(path / EMA_FILE, framework="pt") as file:
        return header.read(file.metadata())[3]


def find_latest(folder: Path) -> Path | None:
    """The latest whole checkpoint, or None for a run that was cut off before its first; damaged ones are named and
    skipped. All processes call it, and get the same one. Raises UserError where all are damaged."""

    def latest() -> Path | None:
        checkpoints = list_checkpoints(folder)
        for path in reversed(checkpoints):
            damage = verify(path)
            if damage is None:
                return path
            print(f"warning: checkpoint {path} is damaged and skipped: {damage}", flush=True)
        if checkpoints:
            raise UserError(f"-r: all checkpoints in {folder} are damaged")
        return None

    return distributed.decided_by_main(latest)


def latest_checkpoint_hint(folder: Path) -> str:
    """For a message about a run that ends."""
    return checkpoint_hint(next(reversed(list_checkpoints(folder)), None))


def checkpoint_hint(latest: Path | None) -> str:
    """The same for a checkpoint that is known; None: there is none."""
    return f"the latest checkpoint is {latest}" if latest else "there is no checkpoint yet"


def list_checkpoints(folder: Path) -> list[Path]:
    """The checkpoints in `folder`, oldest first."""
    return list(step_names.by_step(folder).values())


def is_checkpoint(path: Path) -> bool:
    """Whether the path is a folder with the name of a checkpoint."""
    parsed = step_names.parse(path)
    return parsed is not None and not parsed[1] and path.is_dir()


def ema_files(half_lives: list[int]) -> list[str]:
    """Names of the moving averages inside a checkpoint, in the order of the half-lives."""
    return [EMA_FILE if i == 0 else f"ema_{half_life}.safetensors" for i, half_life in enumerate(half_lives)]


def power_files(widths: list[float]) -> list[str]:
    """Names of the power-function averages inside a checkpoint, in the order of the widths."""
    return [f"power_{posthoc_ema.label(width)}.safetensors" for width in widths]


def verify(path: Path) -> str | None:
    """What is wrong with a checkpoint, by its manifest, or None."""
    try:
        manifest = files.read_json(path / "manifest.json")
        for name, entry in manifest.items():
            file = path / name
            if file.parent != path:
                return f"manifest.json names a file outside of the checkpoint, {name}"
            if not file.is_file():
                return f"{name} is missing"
            if file.stat().st_size != entry["bytes"]:
                return f"{name} has {file.stat().st_size} bytes instead of {entry['bytes']}"
            if files.sha256(file) != entry["sha256"]:
                return f"{name} has changed since it was written"
        for beginnings in _NEEDED:
            if not any(name.startswith(beginnings) for name in manifest):
                return f"manifest.json names no file {' or '.join(beginnings)}..."
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"manifest.json cannot be read ({error})"
    return None


@contextmanager
def _writing(accelerator: Accelerator, path: Path) -> Iterator[None]:
    """All processes stop together where one of them could not write: UserError on each, and nothing unfinished remains."""
    failure: Exception | None = None
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        failure = error
    if not distributed.any_process(accelerator, failure is not None):
        return
    if accelerator.is_main_process:
        shutil.rmtree(path.with_name(f"{files.TEMPORARY}{path.name}"), ignore_errors=True)
    reason = first_line(failure) if failure else "another process failed"
    raise UserError(f"checkpoint {path} was not written: {reason}; {latest_checkpoint_hint(path.parent)}")


def link_ema_snapshots(saved: Path, folder: Path, step: int, half_lives: list[int], keep: int) -> None:
    """Give the averages inside the checkpoint `saved` a second name in `folder`, which outlives the checkpoint.

    The first half-life is step_XXXXXXXX.safetensors, others step_XXXXXXXX.ema_<half-life>.safetensors. Of each, the
    last `keep` stay, with the time grids that were optimized for them; 0 keeps all.
    """
    for name in ema_files(half_lives):
        suffix = name.removeprefix("ema").removesuffix(".safetensors").lstrip("_")
        tail = f".ema_{suffix}.safetensors" if suffix else ".safetensors"
        files.link(saved / name, folder / step_names.name_of(step, tail))
        for old in list(step_names.by_step(folder, tail).values())[:-keep] if keep else []:
            old.unlink()
            grid_store.file_of(old).unlink(missing_ok=True)
