"""The curves of a run: its metrics.jsonl by step, thinned, and what its rows say about the run."""

import math
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from flow.runtime import jsonl
from flow.training import logging

JUMP, RETURN = 5.0, 1.5  # times the lowest loss so far: above the one it has jumped, below the other it has come back


@dataclass
class Curves:
    """The numbers of metrics.jsonl by step, thinned.

    Of a long file each point is the mean over neighboring rows, and `low` and `high` are their extremes; columns that no row
    was thinned in have neither.
    """

    step: list[int] = field(default_factory=list)
    images: list[int | None] = field(default_factory=list)
    hours: list[float] = field(default_factory=list)  # of training, without pauses
    columns: dict[str, dict[str, list[float | None]]] = field(default_factory=dict)  # {name: {"y", "low", "high"}}


@lru_cache(maxsize=256)  # a page that is built again and again reads what has changed
def read_curves(path: Path, modified: int, size: int, points: int) -> tuple[dict[str, Any], list[str]]:
    """What metrics.jsonl says, fields of `Run`, and its damaged lines."""
    lines = jsonl.read_lines(path, logging.damage_of)
    by_step: dict[int, dict] = {}
    for line in lines:
        if line.row is not None:  # rows of evaluations are beside those of the training
            by_step.setdefault(line.row["step"], {}).update(line.row)
    damage = damaged_lines(path, lines)
    if not by_step:
        return {}, damage
    rows = [by_step[step] for step in sorted(by_step)]
    rate, images = _column(rows, "images_per_second"), _column(rows, "images")
    rate[~(rate > 1e-9)] = np.nan
    timed = np.flatnonzero(np.isfinite(rate) & np.isfinite(images))
    spent = np.zeros(len(rows))
    spent[timed] = np.maximum(np.diff(images[timed], prepend=0), 0) / rate[timed]
    seconds = np.cumsum(spent)
    losses = [(row["step"], row["loss"]) for row in rows if jsonl.is_number(row.get("loss")) and math.isfinite(row["loss"])]
    seen = images[np.isfinite(images)]
    fields = {
        "curves": _thin(rows, seconds.tolist(), points),
        "step": rows[-1]["step"],
        "images": int(seen[-1]) if len(seen) else None,
        "seconds": float(seconds[-1]) if len(timed) else None,
        "images_per_second": float(np.median(rate[timed])) if len(timed) else None,
        "loss": losses[-1][1] if losses else None,
        "jump": _jump(losses),
    }
    return fields, damage


def damaged_lines(path: Path, lines: list[jsonl.Line]) -> list[str]:
    """The lines that hold no row, described for a panel."""
    return [jsonl.describe(path, line) for line in lines if line.row is None]


def _jump(losses: list[tuple[int, float]]) -> str:
    """Where the loss of (step, loss) first rose far above its lowest value so far, and whether it came back; or nothing."""
    lowest = math.inf
    for step, loss in losses:
        if 0 < JUMP * lowest < loss:
            back = "recovered" if losses[-1][1] <= RETURN * lowest else "not recovered"
            return f"loss {lowest:.3g} to {loss:.3g} at step {step:,}, {back}"
        lowest = min(lowest, loss)
    return ""


def _number(row: dict, key: str) -> float | None:
    """A finite number of a row."""
    value = row.get(key)
    return float(value) if value is not None and jsonl.is_number(value) and math.isfinite(value) else None


def _thin(rows: list[dict], seconds: list[float], points: int) -> Curves:
    """The columns of the rows with at most so many points, each of a few neighboring rows.

    The neighborhoods are as long in steps as in factors of steps, so that a logarithmic axis has a beginning.
    """
    n = len(rows)
    starts = np.arange(n)
    if n > points:
        linear = np.linspace(0, n - 1, points * 3 // 4)
        factors = np.geomspace(1, n, points // 4) - 1
        starts = np.unique(np.concatenate([linear, factors]).astype(int))
    last = np.append(starts[1:], n) - 1  # row of each neighborhood, which gives its place on the axes
    curves = Curves(
        step=[rows[i]["step"] for i in last],
        images=[None if (value := _number(rows[i], "images")) is None else int(value) for i in last],
        hours=[_short(seconds[i] / 3600) for i in last],
    )
    for name in dict.fromkeys(key for row in rows for key in row if key not in ("step", "images")):
        values = _column(rows, name)
        counts = np.add.reduceat(np.isfinite(values).astype(int), starts)
        if not counts.any():
            continue
        means = np.add.reduceat(np.nan_to_num(values), starts) / np.maximum(counts, 1)
        column = {"y": _listed(means, counts)}
        if counts.max() > 1:
            column |= {"low": _listed(np.fmin.reduceat(values, starts), counts)}
            column |= {"high": _listed(np.fmax.reduceat(values, starts), counts)}
        curves.columns[name] = column
    return curves


def _column(rows: list[dict], name: str) -> np.ndarray:
    """The numbers of a column, nan for those that are not finite or so large that their sums are not."""
    values = [row.get(name) for row in rows]
    if not {type(value) for value in values} <= {float, type(None)}:
        values = [float(value) if value is not None and jsonl.is_number(value) else None for value in values]
    column = np.array(values, dtype=float)  # None becomes nan
    column[~(np.abs(column) < 1e300)] = np.nan
    return column


def _listed(values: np.ndarray, counts: np.ndarray) -> list[float | None]:
    return [_short(value) if count else None for value, count in zip(values.tolist(), counts, strict=True)]


def _short(value: float) -> float:
    """Five digits, which no curve shows more of."""
    return float(f"{value:.5g}")
