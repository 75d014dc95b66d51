"""The entries of a table: means of the rows of results.jsonl over their ranges of images, one a measurement."""

import hashlib
import json
import math
import re
from typing import Any, NamedTuple

from flow.evaluation.intervals import NORMAL_95
from flow.evaluation.results import COST, SETTINGS, WEIGHTS_HASH, is_class_column, key_of

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
BY_FREQUENCY = "by frequency"  # how labels begin in an identity where the classes are as frequent as in the reference
MAX_LABELS = 40  # characters


class Statistic(NamedTuple):
    """A column of an entry."""

    mean: float | None  # over the ranges
    std: float  # over the ranges (n - 1), nan for a single one
    interval: float = math.nan  # half of the 95% interval of the mean over samples, nan where it is not known


EMPTY = Statistic(None, math.nan)


def aggregate(rows: list[dict]) -> list[dict]:
    """One entry a measurement, by NFE: {**subject, "ranges": repeats, "spreads": {...}, "metrics": {name: Statistic}}.

    NFE and forwards are means over the repeats, too; "spreads" has their standard deviations, "images" the training images
    that a snapshot has seen. VARIANT tells apart what differs in the identity of the rows alone, CONTENT references of
    one name.
    """
    groups: dict[str, list[dict]] = {}
    for row in rows:
        groups.setdefault(key_of(row, SETTINGS), []).append(row)
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
    """The entries without those of snapshots that were measured at a single NFE where the same run has a later snapshot."""
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


def model_key(entry: dict) -> str:
    """The weights, guidance scale and method of an entry as one text: "WEIGHTS, GUIDANCE SCALE, METHOD"."""
    scale = 1 if entry["guidance_scale"] is None else entry["guidance_scale"]
    return f"{entry['weights']}, {scale:g}, {entry['method']}"


def distance_name(entries: list[dict]) -> str:
    """The name of the first distance of a table; empty where there is none."""
    return next((name for e in entries for name in e["metrics"] if is_distance(name)), "")


def is_distance(column: str) -> bool:
    """Whether a column is a Frechet distance, or for points SW2, of all samples."""
    return column.startswith(("FID", "FD-", "SW2")) and not is_class_column(column)


def _order(entry: dict) -> tuple:
    """By weights, run@200 before run@1000, then by guidance scale, method, NFE and width of the average."""
    weights = re.sub(r"\d+", lambda number: number.group().zfill(20), str(entry["weights"]))
    return weights, entry["guidance_scale"] or 0, str(entry["method"]), entry["NFE"] or 0, entry["ema_width"] or 0


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
    """Set VARIANT: a digest of what sets an entry apart in its identity where no column shows it, so that no line of a figure
    joins such entries.

    Compared are the entries of a run that differ at most in steps, cost, snapshot and width. VARIANT stays None for an entry
    that has none of the differing names. Where a snapshot of one name has had several contents, the hash of the content counts
    for all but the latest.
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
