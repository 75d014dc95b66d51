"""The one table writer: rows as they come (results.jsonl), and their means over seed ranges as CSV and Markdown."""

import csv
import json
import math
import re
from pathlib import Path

# What a row is about, in the order of the columns; rows that agree in these are repetitions of one measurement.
SUBJECT = ("weights", "captions", "method", "steps", "NFE", "forwards", "guidance_scale", "n", "reference")

CONTROL = "real"  # begins the weights of a row of real images, e.g. "real (test split)"


def append_row(folder: Path, row: dict) -> None:
    """Add a finished row to results.jsonl."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "results.jsonl", "a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")


def read_rows(folder: Path) -> list[dict]:
    """The rows of results.jsonl; of repeated ones the last, and without a last line that a crash cut off."""
    path = folder / "results.jsonl"
    rows: dict[str, dict] = {}
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        try:
            row = json.loads(line)
            rows[_key(row)] = row
        except json.JSONDecodeError:
            continue
    return list(rows.values())


def has(folder: Path, row: dict) -> bool:
    """Whether results.jsonl holds the same measurement with at least the metrics asked for in `row`."""
    found = {_key(r): r for r in read_rows(folder)}.get(_key(row))
    return found is not None and set(row["asked"]) <= set(found["asked"])


def aggregate(rows: list[dict]) -> list[dict]:
    """One entry a subject: {**subject, "ranges": repetitions, "metrics": {name: (mean, std or nan)}}, by NFE.

    The standard deviation is that of the repetitions (n - 1), nan for a single one.
    """
    groups: dict[tuple, list[dict]] = {}
    for row in rows:
        groups.setdefault(tuple(json.dumps(row.get(key)) for key in (*SUBJECT, "identity")), []).append(row)
    entries = []
    for members in groups.values():
        names = dict.fromkeys(name for row in members for name in (*row["metrics"], "seconds"))
        metrics = {}
        for name in names:
            values = [v for row in members if (v := {**row["metrics"], "seconds": row["seconds"]}.get(name)) is not None]
            mean = sum(values) / len(values)
            spread = math.sqrt(sum((v - mean) ** 2 for v in values) / (len(values) - 1)) if len(values) > 1 else math.nan
            metrics[name] = (mean, spread)
        entries.append({**{key: members[0].get(key) for key in SUBJECT}, "ranges": len(members), "metrics": metrics})
    return sorted(entries, key=lambda e: (str(e["weights"]), e["guidance_scale"] or 0, str(e["method"]), e["NFE"] or 0))


def write(folder: Path, rows: list[dict]) -> str:
    """Write results.csv and results.md; returns the Markdown. Columns that say nothing are left out of the latter."""
    entries = aggregate(rows)
    names = [*dict.fromkeys(name for e in entries for name in e["metrics"] if name != "seconds"), "seconds"]
    with open(folder / "results.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow([*SUBJECT, "ranges", *(column for name in names for column in (name, f"{name}_std"))])
        for e in entries:
            pairs = [e["metrics"].get(name, (None, None)) for name in names]
            values = ["" if v is None or math.isnan(v) else v for pair in pairs for v in pair]
            writer.writerow([*("" if e[key] is None else e[key] for key in SUBJECT), e["ranges"], *values])
    subject = [key for key in SUBJECT if any(e[key] is not None for e in entries)]
    if all(e["NFE"] == e["forwards"] for e in entries):
        subject = [key for key in subject if key != "forwards"]
    lines = [[*subject, "ranges", *names]]
    for e in entries:
        cells = [_cell(name, *e["metrics"][name]) if name in e["metrics"] else "" for name in names]
        lines.append([*("" if e[key] is None else str(e[key]) for key in subject), str(e["ranges"]), *cells])
    text = markdown(lines)
    (folder / "results.md").write_text(text + "\n", encoding="utf-8")
    return text


def by_nfe(entries: list[dict], metrics: list[str], names: dict[str, str], extra: dict[str, dict[str, str]]) -> str:
    """Markdown: a row for each (weights, guidance scale) of `names`, a column for each NFE, cells "metric / metric".

    `names` maps f"{weights}, {guidance scale:g}" to what the row is called, in order; `extra` is {column: {row: cell}}.
    """
    found = {}
    for e in entries:
        scale = 1 if e["guidance_scale"] is None else e["guidance_scale"]
        found[f"{e['weights']}, {scale:g}", e["NFE"]] = e["metrics"]
    nfe = sorted({key[1] for key in found})
    lines = [["model", *(f"NFE {n}" for n in nfe), *extra]]
    for key, name in names.items():
        cells = [" / ".join(_cell(m, *found[key, n][m]) for m in metrics) if (key, n) in found else "" for n in nfe]
        lines.append([name, *cells, *(column.get(name, "") for column in extra.values())])
    return markdown(lines)


def is_control(entry: dict) -> bool:
    """Whether this is the row of real images, which no method made."""
    return entry.get("method") is None and str(entry["weights"]).startswith(f"{CONTROL} (")


def _key(row: dict) -> str:
    """What makes two rows the same measurement."""
    names = ("weights", "method", "steps", "guidance_scale", "n", "first", "identity")
    return json.dumps([row.get(name) for name in names], sort_keys=True)


def _cell(name: str, mean: float, spread: float) -> str:
    digits = (
        1
        if name == "seconds"
        else 4
        if name in ("KID", "SW2", "MMD", "energy")
        else 3
        if name in ("accuracy", "precision", "recall")
        else 2
    )
    number = f"{mean:.{digits}f}"
    return number if math.isnan(spread) or name == "seconds" else f"{number} ± {spread:.{digits}f}"


def markdown(lines: list[list[str]]) -> str:
    """A Markdown table whose columns also line up in a terminal; text to the left, numbers to the right."""
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    numeric = [all(re.fullmatch(r"[-+\de.±/ ]*|nan", line[i]) for line in lines[1:]) for i in range(len(widths))]
    rule = ["-" * (w - 1) + (":" if right else "-") for w, right in zip(widths, numeric, strict=True)]
    rows = []
    for line in [lines[0], rule, *lines[1:]]:
        cells = (c.rjust(w) if right else c.ljust(w) for c, w, right in zip(line, widths, numeric, strict=True))
        rows.append("| " + " | ".join(cells) + " |")
    return "\n".join(rows)
