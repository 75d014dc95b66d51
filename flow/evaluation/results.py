"""results.jsonl: the rows of a table as they come, one a measurement, and what their columns of metrics are called."""

import json
import sys
from functools import cache
from pathlib import Path

from tqdm import tqdm

from flow.runtime import files, jsonl

# Rows that agree in these are repeats of one measurement, on ranges of images of their own.
SETTINGS = ("weights", "method", "steps", "guidance_scale", "n", "identity")
PER_CLASS = "per_class"  # the metric of `class_column`
BY = " by "  # in a requested metric, before what else its value depends on, as in "accuracy by cifar10"
COST = ("NFE", "forwards")  # measured: with adaptive methods every repeat has its own
WEIGHTS_HASH = "weights_sha256"  # in an identity: the content of a snapshot
NUMBERS = ("n", "first", "steps", "images", "ema_width", *COST, "guidance_scale", "seconds")
CONTROL = "real"  # the prefix of the weights of a row of real images, e.g. "real (test split)"


def append(folder: Path, row: dict) -> None:
    """Add a finished row to results.jsonl, whole or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    jsonl.append(folder / "results.jsonl", row)


def write(path: Path, rows: list[dict]) -> None:
    """Write the rows to a file of their own, for `read`."""
    files.write_text(path, "".join(f"{json.dumps(row)}\n" for row in rows))


def read(path: Path) -> list[dict]:
    """The rows of a file, or of results.jsonl in a folder, one a measurement: where it was repeated, its last values of every
    metric; distances of classes only where the classes are those of the last time.

    Lines that are not rows are skipped, each with a warning on stderr.
    """
    path = path / "results.jsonl" if path.is_dir() else path
    rows: dict[str, dict] = {}
    for line in jsonl.read_lines(path, damage_of):
        if line.row is None:
            _warn(jsonl.describe(path, line))
            continue
        key = key_of(line.row)
        before = rows.get(key, {"metrics": {}, "requested": []})
        by_metric = {name.partition(BY)[0]: name for name in [*before["requested"], *line.row["requested"]]}
        metrics = {name: {**before.get(name, {}), **line.row.get(name, {})} for name in ("metrics", "standard_errors")}
        if not {name for name in before["requested"] if name.startswith(PER_CLASS)} <= set(by_metric.values()):
            metrics = {
                name: {k: v for k, v in values.items() if not is_class_column(k) or k in line.row.get(name, {})}
                for name, values in metrics.items()
            }
        rows[key] = {**line.row, **metrics, "requested": list(by_metric.values())}
    return list(rows.values())


def rows_of(folder: Path, n: int) -> list[dict]:
    """The rows of n samples. The folder may hold those of other calls."""
    return [row for row in read(folder) if row["n"] == n]


def real_rows(folder: Path, n: int) -> list[dict]:
    """The rows of real images that go with `rows_of`: of n images, or of the most that there are where they are fewer."""
    rows = [row for row in read(folder) if is_control(row) and row["n"] <= n]
    most = max((row["n"] for row in rows), default=0)
    return [row for row in rows if row["n"] == most]


def find(folder: Path, row: dict) -> dict | None:
    """The row of results.jsonl that is the same measurement, or None."""
    return {key_of(r): r for r in read(folder)}.get(key_of(row))


def damage_of(row: dict) -> str | None:
    """Why a JSON object is not a row of results.jsonl, or None."""
    kinds = {"weights": str, "n": int, "identity": dict, "metrics": dict, "seconds": int | float, "requested": list}
    for key, kind in kinds.items():
        if key not in row:
            return f"it has no {key!r}"
        if not isinstance(row[key], kind) or isinstance(row[key], bool):
            return f"its {key!r} has the wrong type"
    extractor = row["identity"].get("extractor", [""])
    if not (isinstance(extractor, list) and extractor):
        return "its 'extractor' is not a list"
    if not isinstance(row["identity"].get("reference"), str | None):
        return "its 'reference' is not text"
    errors = row.get("standard_errors", {})
    if not isinstance(errors, dict):
        return "its 'standard_errors' has the wrong type"
    for key in ("method", "captions", "reference", "guidance_interval", "guide", "source"):
        if not isinstance(row.get(key), str | None):
            return f"its {key!r} is not text"
    numbers = {key: row[key] for key in NUMBERS if row.get(key) is not None}
    for key, value in [*numbers.items(), *row["metrics"].items(), *errors.items()]:
        if value is not None and not jsonl.is_number(value):
            return f"its {key!r} is not a number"
    return None if all(isinstance(name, str) for name in row["requested"]) else "its 'requested' is not a list of metrics"


def is_control(entry: dict) -> bool:
    """Whether this is a row of real images, which have no method."""
    return entry.get("method") is None and str(entry["weights"]).startswith(f"{CONTROL} (")


def class_column(distance: str, class_name: str) -> str:
    """The column of a Frechet distance of one class."""
    return f"{distance}[{class_name}]"


def is_class_column(name: str) -> bool:
    """Whether a column is one of `class_column`."""
    return "[" in name


def key_of(row: dict, names: tuple[str, ...] = (*SETTINGS, "first")) -> str:
    """What makes two rows the same measurement. Snapshots are the same by their content, whatever they are called."""
    hashed = WEIGHTS_HASH in row["identity"]
    return json.dumps([row.get(name) for name in names if not (hashed and name == "weights")], sort_keys=True)


@cache  # rows are read again before each new one
def _warn(message: str) -> None:
    tqdm.write(f"warning: {message}", file=sys.stderr)
