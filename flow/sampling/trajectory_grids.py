"""Grids of the same images along the trajectory from noise to data, at several guidance scales: samples/trajectory of a run.

scripts.animate writes them; scripts.report shows them with a slider over the solver steps and one over the guidance scales.
"""

import contextlib
import dataclasses
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from flow.runtime import files, jsonl
from flow.sampling import images

FOLDER = Path("samples/trajectory")  # in a run folder
MANIFEST = "trajectory.json"
MAX_GRIDS = 10_000  # of a manifest that is read


@dataclass(frozen=True)
class Grid:
    """One picture of a set."""

    file: str  # its name in the folder
    step: int  # of the solver, from 0
    t: float  # in [0, 1], of the linear path
    guidance_scale: float | None  # None: it is the same at every scale


@dataclass(frozen=True)
class TrajectoryGrids:
    """What samples/trajectory of a run holds; image k is at the same place in every grid."""

    weights: str  # run@step
    solver: str
    steps: int  # of the solver from t = 0 to t = 1
    seed: int  # of the noise
    columns: tuple[str, ...]  # the classes or prompts above the columns, where there are names
    grids: tuple[Grid, ...]


def write(folder: Path, grids: TrajectoryGrids, pictures: dict[str, Tensor]) -> None:
    """Write the pictures, uint8 [C, H, W] by file name, as WebP and then their manifest; those of the manifest before are
    deleted.

    The manifest is removed first, so that it never names pictures of other weights.
    """
    before: set[str] = set()
    with contextlib.suppress(ValueError, OSError):  # none, or a damaged one
        before = {grid.file for grid in read(folder / MANIFEST).grids}
    (folder / MANIFEST).unlink(missing_ok=True)
    for name, picture in pictures.items():
        files.write_bytes(folder / name, images.to_webp(images.to_pil(picture)))
    files.write_text(folder / MANIFEST, json.dumps(dataclasses.asdict(grids), indent=1))
    for name in before - pictures.keys():
        (folder / name).unlink(missing_ok=True)


def read(path: Path) -> TrajectoryGrids:
    """The content of a manifest. Raises ValueError that names the entry that is wrong, and OSError."""
    values = files.read_json(path)
    rows = _entry(values, "grids", list)
    if len(rows) > MAX_GRIDS:
        raise ValueError(f"grids: has {len(rows):,} entries, at most {MAX_GRIDS:,} are read")
    columns = _entry(values, "columns", list)
    if not all(isinstance(name, str) for name in columns):
        raise ValueError("columns: must be a list of names")
    steps = _count(values, "steps")
    return TrajectoryGrids(
        _entry(values, "weights", str), _entry(values, "solver", str), steps, _count(values, "seed"),
        tuple(columns), tuple(_grid(row, i, steps) for i, row in enumerate(rows)),
    )  # fmt: skip


def _grid(row: Any, i: int, steps: int) -> Grid:
    """Entry i of the grids. Raises ValueError."""
    try:
        if not isinstance(row, dict):
            raise ValueError("must be an object")
        name, step = _entry(row, "file", str), _count(row, "step")
        t: Any = row.get("t")
        scale: Any = row.get("guidance_scale")
        if not name or name != Path(name).name or "\0" in name:
            raise ValueError(f"file={name!r}: must be the name of a file beside the manifest")
        if step > steps:
            raise ValueError(f"step={step}: must be at most steps={steps}")
        if not jsonl.is_number(t) or not 0 <= t <= 1:
            raise ValueError(f"t={t!r}: must be a number from 0 to 1")
        if scale is not None and not (jsonl.is_number(scale) and scale >= 0 and math.isfinite(scale)):
            raise ValueError(f"guidance_scale={scale!r}: must be null or a finite number of 0 or more")
    except ValueError as error:
        raise ValueError(f"grids[{i}]: {error}") from None
    return Grid(name, step, float(t), None if scale is None else float(scale))


def _entry(values: dict, key: str, kind: type[str] | type[list]) -> Any:
    value = values.get(key)
    if not isinstance(value, kind):
        expected = "text" if kind is str else "a list"
        raise ValueError(f"{key}={str(value)[:40]!r}: must be {expected}" if key in values else f"has no {key!r}")
    return value


def _count(values: dict, key: str) -> int:
    value = values.get(key)
    if type(value) is not int or not 0 <= value < 2**63:
        raise ValueError(
            f"{key}={str(value)[:40]!r}: must be a whole number of 0 or more" if key in values else f"has no {key!r}"
        )
    return value
