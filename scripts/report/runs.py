"""A run folder as a plain dataclass: what its files say, without locks, whatever state they are in.

A damaged or missing file leaves a line in `Run.problems` for the panel that lacks its content; everything else is read.
"""

import math
import os
import re
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from safetensors import SafetensorError, safe_open

from configs import stored
from configs.errors import UserError, first_line
from flow.evaluation import results
from flow.evaluation.entries import CONTENT, aggregate, distance_name
from flow.runtime import commands, files, jsonl, lock, step_names
from flow.sampling import header, locate, trajectory_grids
from flow.sampling.trajectory_grids import TrajectoryGrids
from flow.training import logging
from scripts.report import suggestions
from scripts.report.curves import Curves, damaged_lines, read_curves

PANELS = ("overview", "curves", "quality", "samples", "figures", "runs")  # sections of the page
MARKS = ("metrics.jsonl", "environment.json", "log.txt")  # files that make a folder a run
DEPTH = 4  # of run folders below a folder
# Folders in a run that hold neither runs nor figures.
OTHERS = ("checkpoints", "power_averages", "posthoc_ema", "samples", "set_aside", "snapshots", "tensorboard", "wandb")
# Files that every run has, and where they are missed.
EXPECTED = {"config.yaml": "overview", "environment.json": "overview", "log.txt": "overview", "metrics.jsonl": "curves"}
QUIET_SECONDS = 15 * 60  # a run on another host that has written nothing for so long counts as stopped
LOG_LINES = 30  # of log.txt that are shown
DAMAGED_LINES = 3  # of a file that are named
# Lines of log.txt: a start, an end, a stop by a signal.
STARTED, ENDED, STOPPED = "device: ", re.compile(r": (finished step|stopped at step) \d+, in "), "stopped by SIG"

T = TypeVar("T")


@dataclass
class Status:
    """What became of a run."""

    kind: str  # running | finished | stopped | failed | unknown
    detail: str = ""  # its error line, the process that runs it, or how it stopped
    resumed: int = 0  # how often


@dataclass(frozen=True)
class Problem:
    """A file that could not be read."""

    panel: str  # one of PANELS: where it is missing
    text: str  # the file and the reason


@dataclass
class Run:
    """What a report shows of a run."""

    folder: Path
    name: str
    status: Status = field(default_factory=lambda: Status("unknown"))
    problems: list[Problem] = field(default_factory=list)
    config: dict[str, str] = field(default_factory=dict)  # the values by dotted key, as YAML
    starts: list[dict] = field(default_factory=list)  # environment.json
    steps: int | None = None  # that the configuration asks for
    step: int | None = None  # the last one that was logged
    images: int | None = None  # training images seen by then
    seconds: float | None = None  # of training by then, without pauses
    images_per_second: float | None = None  # the median over the rows
    loss: float | None = None  # the last one
    jump: str = ""  # of the loss, if it had one
    curves: Curves = field(default_factory=Curves)
    entries: list[dict] = field(default_factory=list)  # of its tables, see `aggregate`
    previews: dict[int, Path] = field(default_factory=dict)  # by step
    trajectory: TrajectoryGrids | None = None  # what samples/trajectory holds
    figures: list[Path] = field(default_factory=list)
    log: list[str] = field(default_factory=list)  # its last lines
    commands: dict[str, str] = field(default_factory=dict)  # {what it does: the command}

    def add_problems(self, panel: str, name: str, lines: Sequence[str]) -> None:
        """Lines about a file or several of a kind, `name`: the first few, and how many there are."""
        self.problems += [Problem(panel, line) for line in lines[:DAMAGED_LINES]]
        if len(lines) > DAMAGED_LINES:
            self.problems.append(Problem(panel, f"{name}: {len(lines) - DAMAGED_LINES:,} further problems"))

    @property
    def is_empty(self) -> bool:
        """Whether its folder holds no file of a run, or may not be read."""
        return not any(os.path.exists(self.folder / name) for name in EXPECTED)  # Path.exists raises where it may not look

    @property
    def environment(self) -> dict:
        """The environment of the last start."""
        return self.starts[-1] if self.starts else {}

    @property
    def distance(self) -> str:
        """The name of the first distance of its tables."""
        return distance_name(self.entries)

    @property
    def best(self) -> dict | None:
        """The entry with the smallest distance: among those of the most images on the most common reference, as distances of
        other n or to other images do not compare."""
        name = self.distance
        measured = [e for e in self.entries if e["method"] is not None and name in e["metrics"]]
        finite = [e for e in measured if math.isfinite(e["metrics"][name].mean)]
        references = [(e["reference"], e[CONTENT]) for e in finite]
        common = Counter(references).most_common(1)
        alike = [e for e, reference in zip(finite, references, strict=True) if reference == common[0][0]]
        most = max((e["n"] for e in alike), default=0)
        return min((e for e in alike if e["n"] == most), key=lambda e: e["metrics"][name].mean, default=None)


def find_runs(paths: list[Path]) -> list[Path]:
    """The run folders that these folders are or hold, in their order, each once.

    Raises:
        UserError: for a path that is no folder.
    """
    folders: dict[Path, Path] = {}
    for path in paths:
        if not path.is_dir():
            raise UserError(f"{path}: there is no such folder; give run folders, or a folder of runs")
        for folder in _runs_in(path) or [path]:
            folders.setdefault(folder.resolve(), folder)
    return list(folders.values())


def read_run(folder: Path, name: str, points: int, pictures: list[Path]) -> Run:
    """Everything about a run. points: of a curve, at most. pictures: further folders with figures of it."""
    run = Run(folder, name)
    if not os.access(folder, os.R_OK | os.X_OK):
        run.add_problems("overview", str(folder), [f"{folder}: may not be read"])
    elif run.is_empty:
        run.add_problems("overview", str(folder), [f"{folder}: holds no file of a run"])
    else:
        for file, panel in EXPECTED.items():
            if not os.path.exists(folder / file):
                run.add_problems(panel, file, [f"{file}: is missing"])
    for name_of_folder, panel in {"samples": "samples", "snapshots": "runs"}.items():
        place = folder / name_of_folder
        if os.path.exists(place) and not (place.is_dir() and os.access(place, os.R_OK | os.X_OK)):
            run.add_problems(panel, name_of_folder, [f"{name_of_folder}: is no folder that can be read"])
    nothing: tuple[dict[str, Any], dict[str, Any]] = {}, {}
    values, interpolations = _read(run, "overview", "config.yaml", _read_config, nothing)
    run.config = {key: commands.override(key, value).removeprefix(f"{key}=") for key, value in values.items()}
    run.steps = values.get("train.steps")
    run.starts = _read(run, "overview", "environment.json", _read_starts, [])
    run.log = _read(run, "overview", "log.txt", _read_log, [])
    run.status = _status(run)
    no_rows: tuple[dict[str, Any], list[str]] = {}, []
    fields, damage = _read(run, "curves", "metrics.jsonl", lambda path: read_curves(path, *version(path), points), no_rows)
    for name_of_field, value in fields.items():
        setattr(run, name_of_field, value)
    run.add_problems("curves", "metrics.jsonl", damage)
    for path in sorted(folder.glob("evaluation*/results.jsonl")):
        name_of_file = str(path.relative_to(folder))
        no_entries: tuple[list[dict], list[str]] = [], []
        entries, damage = _read(run, "quality", name_of_file, _read_entries, no_entries)
        run.entries += entries
        run.add_problems("quality", name_of_file, damage)
    run.previews = step_names.by_step(folder / "samples", ".png")
    manifest = str(trajectory_grids.FOLDER / trajectory_grids.MANIFEST)
    run.trajectory = _read(run, "samples", manifest, trajectory_grids.read, None)
    run.figures = _figures(folder, pictures)
    if values:
        class_names = _class_names(run) if suggestions.trains_flow(run.environment) else None
        run.commands = suggestions.suggest(folder, run.environment, values, interpolations, class_names, run.best)
    run.log = run.log[-LOG_LINES:]
    return run


def differing_keys(runs: list[Run]) -> list[str]:
    """The configuration keys in which the runs that have one differ, in their order."""
    configs = [run.config for run in runs if run.config]
    keys = dict.fromkeys(key for config in configs for key in config)
    return [key for key in keys if len({config.get(key) for config in configs}) > 1]


def _runs_in(path: Path, depth: int = DEPTH) -> list[Path]:
    """The run folders at or below a path. A run may hold others, as those of scripts.rectify do."""
    own = [path] if any(os.path.isfile(path / mark) for mark in MARKS) else []
    try:
        below = sorted(p for p in path.iterdir() if p.is_dir() and p.name not in OTHERS and not p.name.startswith("."))
    except OSError:
        return own
    return own + [run for folder in below if depth for run in _runs_in(folder, depth - 1)]


def _read(run: Run, panel: str, name: str, read: Callable[[Path], T], missing: T) -> T:
    """`read` of a file of the run; where that fails `missing`, and a line for the panel. Where there is no file: `missing`."""
    path = run.folder / name
    try:
        return read(path) if os.path.exists(path) else missing
    except IsADirectoryError:
        reason = "is a folder"
    except OSError as error:
        reason = error.strerror or first_line(error)
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError, OverflowError, MemoryError) as error:
        reason = first_line(error)
    run.add_problems(panel, name, [f"{name}: {reason}"])
    return missing


def _read_starts(path: Path) -> list[dict]:
    starts = files.read_json(path, list)
    if not all(isinstance(start, dict) for start in starts):
        raise ValueError("it is not a list of objects")
    return starts


def _read_log(path: Path) -> list[str]:
    return path.read_text(encoding="utf-8", errors="replace").splitlines()


def _read_config(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """The values by dotted key; and those of them that are interpolations."""
    tree, interpolations = stored.read(path.read_text(encoding="utf-8"))
    return {stored.dotted(place): value for place, value in stored.leaves(tree)} | interpolations, interpolations


def _read_entries(path: Path) -> tuple[list[dict], list[str]]:
    """The entries of a results.jsonl, and its damaged lines."""
    damage = damaged_lines(path, jsonl.read_lines(path, results.damage_of))
    return aggregate(results.read(path.parent)), damage


def _status(run: Run) -> Status:
    """The status by the end of log.txt and by the process that has signed the lock file."""
    resumed = max(0, len(run.starts) - 1)
    events: list[str] = []
    for line in run.log:
        if line.startswith(STARTED):
            events = []
        elif line.startswith((logging.ERROR_PREFIX, STOPPED)) or ENDED.search(line):
            events.append(line)
    errors = [line for line in events if line.startswith(logging.ERROR_PREFIX)]  # of several processes the first is the cause
    event = (errors[:1] or events[-1:] or [""])[0]
    holder = lock.holder(run.folder)
    if holder and not event and _is_running(run.folder, holder):
        return Status("running", f"process {holder.pid} on {holder.host} since {holder.since}", resumed)
    if event.startswith(logging.ERROR_PREFIX):
        return Status("failed", event.removeprefix(logging.ERROR_PREFIX), resumed)
    if ended := ENDED.search(event):
        return Status("finished" if ended[1] == "finished step" else "stopped", resumed=resumed)
    if event:
        return Status("stopped", event.partition(";")[0], resumed)
    if run.log:
        return Status("stopped", "no last line in log.txt: the process was killed, or the machine went down", resumed)
    return Status("unknown", "there is no log.txt", resumed)


def _is_running(folder: Path, holder: lock.Holder) -> bool:
    """Whether the holder of the lock is alive; on another host, whether the run has written something lately."""
    alive = holder.is_alive()
    if alive is not None:
        return alive
    written = 0.0
    for name in (*MARKS, files.LOCK):
        with suppress(OSError):  # it may be gone by now
            written = max(written, (folder / name).stat().st_mtime)
    return time.time() - written < QUIET_SECONDS


def version(path: Path) -> tuple[int, int]:
    """What changes when a file is written: what was read from it is kept as long as this stays the same."""
    stat = path.stat()
    return stat.st_mtime_ns, stat.st_size


def _figures(folder: Path, pictures: list[Path]) -> list[Path]:
    """PNG and GIF files of a run: of its tables first, then of other folders in it, e.g. of scripts.animate --out."""
    with suppress(OSError):
        inside = sorted(p for p in folder.iterdir() if p.is_dir() and p.name not in OTHERS and not (p / MARKS[0]).exists())
        inside.sort(key=lambda p: not p.name.startswith("evaluation"))
        return [p for place in [*inside, folder, *pictures] for kind in ("*.gif", "*.png") for p in sorted(place.glob(kind))]
    return []


def _class_names(run: Run) -> tuple[str, ...] | None:
    """The class names of the latest snapshot; None where there is none, or where it is damaged."""
    try:
        weights = locate.find(run.folder)
    except UserError:  # no snapshot yet
        return None
    return _read(run, "runs", str(weights.relative_to(run.folder)), _read_class_names, None)


def _read_class_names(weights: Path) -> tuple[str, ...]:
    """The class names in the header of a snapshot, which is checked. Raises ValueError where it is damaged."""
    try:
        with safe_open(weights, framework="pt") as file:
            entries = file.metadata() or {}
    except SafetensorError as error:
        raise ValueError(f"not a whole safetensors file ({error})") from None
    if missing := header.KEYS - entries.keys():
        raise ValueError(f"its header lacks {', '.join(sorted(missing))}")
    *_, class_names = header.read(entries)
    return class_names
