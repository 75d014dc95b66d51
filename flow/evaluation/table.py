"""The one table writer: rows as they come (results.jsonl), and their means over seed ranges as CSV and Markdown."""

import csv
import hashlib
import json
import math
import re
import sys
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from tqdm import tqdm

from flow.evaluation.intervals import NORMAL_95
from flow.runtime import files, jsonl

GUIDANCE = ("guidance_scale", "guidance_interval", "guide")
# How the samples were made, from the identity of a row: columns only where the samples of a table differ in them.
DRAWN = ("labels", "seed", "mixed_precision", "times")
VARIANT = "variant"  # the column that tells entries apart where no other one does, see `_name_variants`
CONTENT = "reference_content"  # a hash of the reference and the extractor: folders of other images may have one name
# What a row is about, in the order of the columns.
KEY_COLUMNS = (
    "weights", "ema_width", "captions", "method", "steps", "NFE", "forwards", *GUIDANCE, "source", *DRAWN, VARIANT, "n",
    "reference",
)  # fmt: skip
# Rows that agree in these are repeats of one measurement, on ranges of images of their own.
SETTINGS = ("weights", "method", "steps", "guidance_scale", "n", "identity")
PER_CLASS = "per_class"  # the metric of `class_column`
BY = " by "  # in a requested metric, before what else its value depends on, as in "accuracy by cifar10"
COST = ("NFE", "forwards")  # measured: with adaptive methods every repeat has its own
WEIGHTS_HASH = "weights_sha256"  # in an identity: the content of a snapshot
NUMBERS = ("n", "first", "steps", "images", "ema_width", *COST, "guidance_scale", "seconds")

NOTE = "±: 95% interval over samples, at this n (columns _inf: of the limit). sd: standard deviation over the ranges."
CLASS_NOTE = "Empty cells: no more images of the class than features, among the samples or in the reference."
FOUR_DIGITS = ("KID", "SW2", "MMD", "energy", "memorization")
THREE_DIGITS = ("accuracy", "precision", "recall", "density", "coverage")
SMALL_DISTANCE = "FD-inception-"  # of the layers before the last, which is FID: 0.12 at 768 features is a good model
BY_FREQUENCY = "by frequency"  # how labels begin in an identity where the classes are as frequent as in the reference
MAX_LABELS = 40  # characters
CONTROL = "real"  # the prefix of the weights of a row of real images, e.g. "real (test split)"


class Statistic(NamedTuple):
    """A column of an entry."""

    mean: float | None  # over the ranges
    std: float  # over the ranges (n - 1), nan for a single one
    interval: float = math.nan  # half of the 95% interval of the mean over samples, nan where it is not known


EMPTY = Statistic(None, math.nan)


def class_column(distance: str, class_name: str) -> str:
    """The column of a Frechet distance of one class."""
    return f"{distance}[{class_name}]"


def is_class_column(name: str) -> bool:
    """Whether a column is one of `class_column`."""
    return "[" in name


def append_row(folder: Path, row: dict) -> None:
    """Add a finished row to results.jsonl, whole or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    jsonl.append(folder / "results.jsonl", row)


def write_rows(path: Path, rows: list[dict]) -> None:
    """Write the rows to a file of their own, for `read_rows`."""
    files.write_text(path, "".join(f"{json.dumps(row)}\n" for row in rows))


def read_rows(path: Path) -> list[dict]:
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
        key = _key(line.row)
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


def rows_of(folder: Path, n: int, extractor: str | None = None) -> list[dict]:
    """The rows of n samples that were measured with this feature extractor (None: with any). The folder may hold those of
    other calls."""
    return [row for row in read_rows(folder) if row["n"] == n and _is_measured_with(extractor, row)]


def floors(folder: Path, n: int) -> list[dict]:
    """The rows of real images that go with `rows_of`: of n images, or of the most that there are where they are fewer."""
    rows = [row for row in read_rows(folder) if is_control(row) and row["n"] <= n]
    most = max((row["n"] for row in rows), default=0)
    return [row for row in rows if row["n"] == most]


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


def find(folder: Path, row: dict) -> dict | None:
    """The row of results.jsonl that is the same measurement, or None."""
    return {_key(r): r for r in read_rows(folder)}.get(_key(row))


def contains(folder: Path, row: dict) -> bool:
    """Whether results.jsonl holds the same measurement with at least the requested metrics of `row`."""
    existing = find(folder, row)
    return existing is not None and set(row["requested"]) <= set(existing["requested"])


def aggregate(rows: list[dict]) -> list[dict]:
    """One entry a measurement, by NFE: {**subject, "ranges": repeats, "spreads": {...}, "metrics": {name: Statistic}}.

    NFE and forwards are means over the repeats, too; "spreads" has their standard deviations, "images" the training images
    that a snapshot has seen. VARIANT tells apart what differs in the identity of the rows alone, CONTENT references of
    one name.
    """
    groups: dict[str, list[dict]] = {}
    for row in rows:
        groups.setdefault(_key(row, SETTINGS), []).append(row)
    entries, identities = [], []
    for members in groups.values():
        names = dict.fromkeys(name for row in members for name, value in row["metrics"].items() if value is not None)
        metrics = {name: _metric(name, members) for name in names}
        metrics["seconds"] = _statistics([row["seconds"] for row in members])
        cost = {key: _statistics([row.get(key) for row in members]) for key in COST}
        subject = {key: cost[key].mean if key in COST else members[-1].get(key) for key in KEY_COLUMNS}
        subject |= {**_drawn(members[-1]["identity"]), VARIANT: None, CONTENT: members[-1]["identity"].get("reference")}
        spreads = {key: value.std for key, value in cost.items()}
        images = members[-1].get("images")
        entries.append({**subject, "images": images, "ranges": len(members), "spreads": spreads, "metrics": metrics})
        identities.append(members[-1]["identity"])
    _leave_out_times(entries)
    _name_variants(entries, identities)
    return sorted(entries, key=_order)


def without_earlier_snapshots(entries: list[dict]) -> list[dict]:
    """The entries without those of a snapshot that has a single NFE and that the same run has a later one of."""
    latest: dict[str, int] = {}
    for e in entries:
        latest[run_of(e)] = max(latest.get(run_of(e), 0), e["images"] or 0)
    costs: dict[str, set] = {}
    for e in entries:
        costs.setdefault(str(e["weights"]), set()).add(e["NFE"])
    return [e for e in entries if e["images"] in (None, latest[run_of(e)]) or len(costs[str(e["weights"])]) > 1]


def run_of(entry: dict) -> str:
    """The run of a snapshot whose weights are called "run@step"."""
    return str(entry["weights"]).rpartition("@")[0]


def summary(row: dict) -> str:
    """The metrics of a row on one line: FD-digits 0.63 ± 0.22, accuracy 0.984."""
    (entry,) = aggregate([row])
    return ", ".join(f"{name} {cell(name, value)}" for name, value in entry["metrics"].items() if name != "seconds")


def write(folder: Path, rows: list[dict]) -> str:
    """Write results.csv, results.md and, where there are distances of classes, per_class.md; returns the Markdown of both.

    Empty columns are left out of the Markdown; distances of classes have a file of their own.
    """
    entries = aggregate(rows)
    names = metric_names(entries)
    known = {name for e in entries for name, value in e["metrics"].items() if not math.isnan(value.interval)}
    columns_of = {name: [name, f"{name}_std", *([f"{name}_interval"] if name in known else [])] for name in names}
    with files.csv_file(folder / "results.csv") as file:
        writer = csv.writer(file)
        subject = [column for key in _subject(entries) for column in ((key, f"{key}_std") if key in COST else (key,))]
        writer.writerow([*subject, "ranges", *(column for name in names for column in columns_of[name])])
        for e in entries:
            values = {**e, **{f"{key}_std": std for key, std in e["spreads"].items()}}
            numbers = [v for name in names for v in e["metrics"].get(name, EMPTY)[: len(columns_of[name])]]
            cells = [*(values[key] for key in subject), e["ranges"], *numbers]
            writer.writerow(["" if v is None or v != v else v for v in cells])
    text = _table(entries, [name for name in names if not is_class_column(name)])
    files.write_text(folder / "results.md", text + "\n")
    classes = [name for name in names if is_class_column(name)]
    if classes:
        measured = [e for e in entries if any(name in e["metrics"] for name in classes)]
        whole = all(name in e["metrics"] for e in measured for name in classes)
        by_class = _table(measured, classes) + ("" if whole else f"\n\n{CLASS_NOTE}")
        files.write_text(folder / "per_class.md", by_class + "\n")
        text += f"\n\n{by_class}"
    return text


def metric_names(entries: list[dict]) -> list[str]:
    """The columns that are metrics, "seconds" last."""
    return [*dict.fromkeys(name for e in entries for name in e["metrics"] if name != "seconds"), "seconds"]


def metric_cells(entries: list[dict]) -> list[list[str]]:
    """`cells` of all metrics but the distances of classes."""
    return cells(entries, [name for name in metric_names(entries) if not is_class_column(name)])


def _table(entries: list[dict], names: list[str]) -> str:
    """Markdown of these metrics of the entries, with a note on its intervals."""
    known = any(not math.isnan(e["metrics"].get(name, EMPTY).interval) for e in entries for name in names)
    return markdown(cells(entries, names)) + (f"\n\n{NOTE}" if known else "")


def cells(entries: list[dict], names: list[str]) -> list[list[str]]:
    """The table of these metrics of the entries as text: the names of the columns, then a line an entry; columns of subject
    that are empty are left out."""
    subject = [key for key in _subject(entries) if any(e[key] is not None for e in entries)]
    if all(e["NFE"] == e["forwards"] for e in entries):
        subject = [key for key in subject if key != "forwards"]
    lines = [[*subject, "ranges", *names]]
    for e in entries:
        about = [_cost_cell(e[key], e["spreads"][key]) if key in COST else e[key] for key in subject]
        values = [cell(name, e["metrics"][name]) if name in e["metrics"] else "" for name in names]
        lines.append([*("" if v is None else str(v) for v in about), str(e["ranges"]), *values])
    return lines


def by_nfe(entries: list[dict], metrics: list[str], names: dict[str, str], extra: dict[str, dict[str, str]]) -> str:
    """Markdown: a row for each (weights, guidance scale, method) of `names`, a column for each NFE, cells "metric / metric".

    `names` maps the `model_key` of each to what the row is called, in order; `extra` is {column: {row: cell}}.
    """
    results = {(model_key(e), e["NFE"]): e["metrics"] for e in entries}
    nfe = sorted({key[1] for key in results})
    lines = [["model", *(f"NFE {n}" for n in nfe), *extra]]
    for key, name in names.items():
        cells = [" / ".join(cell(m, results[key, n][m]) for m in metrics) if (key, n) in results else "" for n in nfe]
        lines.append([name, *cells, *(column.get(name, "") for column in extra.values())])
    return markdown(lines)


def model_key(entry: dict) -> str:
    """What an entry of the table is of: "WEIGHTS_HASH, GUIDANCE SCALE, METHOD"."""
    scale = 1 if entry["guidance_scale"] is None else entry["guidance_scale"]
    return f"{entry['weights']}, {scale:g}, {entry['method']}"


def distance_name(entries: list[dict]) -> str:
    """The name of the first distance of a table; empty where there is none."""
    return next((name for e in entries for name in e["metrics"] if is_distance(name)), "")


def is_distance(column: str) -> bool:
    """Whether a column is a Frechet distance, or for points SW2, of all samples."""
    return column.startswith(("FID", "FD-", "SW2")) and not is_class_column(column)


def is_control(entry: dict) -> bool:
    """Whether this is a row of real images, which have no method."""
    return entry.get("method") is None and str(entry["weights"]).startswith(f"{CONTROL} (")


def _is_measured_with(extractor: str | None, row: dict) -> bool:
    return extractor in (None, row["identity"].get("extractor", [None])[0])


def _key(row: dict, names: tuple[str, ...] = (*SETTINGS, "first")) -> str:
    """What makes two rows the same measurement. Snapshots are the same by their content, whatever they are called."""
    hashed = WEIGHTS_HASH in row["identity"]
    return json.dumps([row.get(name) for name in names if not (hashed and name == "weights")], sort_keys=True)


def _order(entry: dict) -> tuple:
    """By weights, run@200 before run@1000, then by guidance scale, method, NFE and width of the average."""
    weights = re.sub(r"\d+", lambda number: number.group().zfill(20), str(entry["weights"]))
    return weights, entry["guidance_scale"] or 0, str(entry["method"]), entry["NFE"] or 0, entry["ema_width"] or 0


def _subject(entries: list[dict]) -> list[str]:
    """The columns of subject: of DRAWN those in which the samples differ, VARIANT where there are any."""
    samples = [e for e in entries if e["method"] is not None]  # others are of real images or a folder
    empty = [key for key in DRAWN if len({e[key] for e in samples}) < 2]
    empty += [] if any(e[VARIANT] for e in entries) else [VARIANT]
    return [key for key in KEY_COLUMNS if key not in empty]


def _drawn(identity: dict) -> dict[str, str | None]:
    """The columns DRAWN of a row, as text; None for what its identity does not hold."""
    known = {key: None if identity.get(key) is None else str(identity[key]) for key in DRAWN}
    if identity.get("labels") and isinstance(identity["labels"], list | tuple):
        known["labels"] = _labels_cell(list(identity["labels"]))
    elif known["labels"] and known["labels"].startswith(BY_FREQUENCY):  # what follows tells references apart
        known["labels"] = BY_FREQUENCY
    known["times"] = _digest(identity["times"]) if identity.get("times") else None
    return known


def _labels_cell(labels: list) -> str:
    """Labels in turn, each turn once: captions of several wordings repeat it."""
    n = len(labels)
    periods = (p for p in range(1, n + 1) if n % p == 0 and labels == labels[:p] * (n // p))
    turn = labels[: next(periods)]
    text = " ".join(map(str, turn))
    return text if len(text) <= MAX_LABELS else f"{len(turn)} labels {_digest(turn)}"


def _leave_out_times(entries: list[dict]) -> None:
    """Leave the times only where nothing else tells entries apart: each number of steps has times of its own."""
    alike: dict[tuple, list[dict]] = {}
    for e in entries:
        alike.setdefault(tuple(e[key] for key in KEY_COLUMNS if key not in (*COST, "times")), []).append(e)
    for members in alike.values():
        if len({e["times"] for e in members}) == 1:
            for e in members:
                e["times"] = None


def _name_variants(entries: list[dict], identities: list[dict]) -> None:
    """Name entries that differ only in what no column shows, by a digest of it: they are no repeats of each other, and no line
    of a figure may hold both. One that has none of the differing things stays without, and so does the latest of several
    contents of a snapshot.

    Compared are those of a run that differ in steps, cost, snapshot and width alone, over which lines run.
    """
    alike: dict[str, list[int]] = {}
    for k, (entry, identity) in enumerate(zip(entries, identities, strict=True)):
        alike.setdefault(_line(entry, identity), []).append(k)
    for members in alike.values():
        latest = {_snapshot(entries[k]): identities[k].get(WEIGHTS_HASH) for k in members}  # rows are in their order
        names = dict.fromkeys(name for k in members for name in identities[k] if name not in ("times", WEIGHTS_HASH))
        differing = [name for name in names if len({_text(identities[k].get(name)) for k in members}) > 1]
        for k in members:
            is_latest = identities[k].get(WEIGHTS_HASH) == latest[_snapshot(entries[k])]
            shown = differing if is_latest else [*differing, WEIGHTS_HASH]
            own = {name: identities[k][name] for name in shown if identities[k].get(name) is not None}
            entries[k][VARIANT] = _digest(own) if own else None


def _line(entry: dict, identity: dict) -> str:
    """What the entries of a line of a figure have in common but for their variant."""
    along = (VARIANT, *COST, "steps", "times", "weights", "ema_width")  # each number of steps has optimized times of its own
    extractor = identity.get("extractor")
    space = extractor[:2] if isinstance(extractor, list | tuple) else extractor  # which names the columns of metrics
    run = run_of(entry) if entry["method"] is not None else ""  # else of real images or a folder
    return _text([run or entry["weights"], space, *(entry[key] for key in KEY_COLUMNS if key not in along)])


def _snapshot(entry: dict) -> tuple:
    """What a table calls weights."""
    return entry["weights"], entry["ema_width"]


def _text(value: Any) -> str:
    return json.dumps(value, sort_keys=True)


def _digest(values: Any) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:8]


@cache  # rows are read again before each new one
def _warn(message: str) -> None:
    tqdm.write(f"warning: {message}", file=sys.stderr)


def _metric(name: str, rows: list[dict]) -> Statistic:
    """A metric of the ranges of a measurement; their samples are independent, so the variances of their errors add up."""
    errors = [row.get("standard_errors", {}).get(name) for row in rows]
    value = _statistics([row["metrics"].get(name) for row in rows])
    if None in errors:
        return value
    return value._replace(interval=NORMAL_95 * math.sqrt(sum(error * error for error in errors)) / len(errors))


def _statistics(values: list) -> Statistic:
    """Mean and standard deviation (n - 1) of those that are not None; None and nan for none, the value itself for one."""
    present = [v for v in values if v is not None]
    if len(set(present)) < 2:
        return Statistic(present[0] if present else None, 0.0 if len(present) > 1 else math.nan)
    mean = sum(present) / len(present)
    return Statistic(mean, math.sqrt(sum((v - mean) * (v - mean) for v in present) / (len(present) - 1)))


def _cost_cell(mean: float | None, spread: float) -> str | None:
    """A number of evaluations: whole where it is, with its spread where repeats differ."""
    if mean is None:
        return None
    number = f"{mean:.1f}".removesuffix(".0")
    return f"{number} (sd {spread:.1f})" if spread > 0 else number


def decimals(name: str) -> int:
    """Of a metric in tables, by its name."""
    if name in FOUR_DIGITS or name.startswith("KD-"):
        return 4
    return 3 if name in THREE_DIGITS or name.startswith(SMALL_DISTANCE) else 2


def cell(name: str, value: Statistic) -> str:
    """A metric as tables have it: mean, 95% interval and spread where they are known; empty where there is no mean."""
    if value.mean is None:
        return ""
    digits = decimals(name)
    if name == "seconds":
        return f"{value.mean:.1f}"
    interval = "" if math.isnan(value.interval) else f" ± {value.interval:.{digits}f}"
    spread = "" if math.isnan(value.std) else f" (sd {value.std:.{digits}f})"
    return f"{value.mean:.{digits}f}{interval}{spread}"


def markdown(lines: list[list[str]]) -> str:
    """A Markdown table whose columns also line up in a terminal; text to the left, numbers to the right."""
    lines = [[text.replace("|", r"\|") for text in line] for line in lines]
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    numeric = [all(re.fullmatch(r"[-+\de.±/ ()sd]*|nan", line[i]) for line in lines[1:]) for i in range(len(widths))]
    rule = ["-" * (w - 1) + (":" if right else "-") for w, right in zip(widths, numeric, strict=True)]
    rows = []
    for line in [lines[0], rule, *lines[1:]]:
        cells = (c.rjust(w) if right else c.ljust(w) for c, w, right in zip(line, widths, numeric, strict=True))
        rows.append("| " + " | ".join(cells) + " |")
    return "\n".join(rows)
