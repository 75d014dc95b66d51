"""The one table writer: entries as CSV and Markdown."""

import csv
import math
import re
from pathlib import Path

from flow.evaluation.entries import DRAWN, EMPTY, KEY_COLUMNS, VARIANT, Statistic, aggregate, model_key
from flow.evaluation.results import COST, is_class_column
from flow.runtime import files

NOTE = "±: 95% interval over samples, at this n (columns _inf: of the limit). sd: standard deviation over the ranges."
CLASS_NOTE = "Empty cells: no more images of the class than features, among the samples or in the reference."
FOUR_DIGITS = ("KID", "SW2", "MMD", "energy", "memorization")
THREE_DIGITS = ("accuracy", "precision", "recall", "density", "coverage")
SMALL_DISTANCE = "FD-inception-"  # of the layers before the last, which is FID: 0.12 at 768 features is a good model


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


def decimals(name: str) -> int:
    """The number of decimals of a metric, by its name."""
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


def _table(entries: list[dict], names: list[str]) -> str:
    """Markdown of these metrics of the entries, with a note on its intervals."""
    known = any(not math.isnan(e["metrics"].get(name, EMPTY).interval) for e in entries for name in names)
    return markdown(cells(entries, names)) + (f"\n\n{NOTE}" if known else "")


def _subject(entries: list[dict]) -> list[str]:
    """The columns of subject: of DRAWN those in which the samples differ, VARIANT where there are any."""
    samples = [e for e in entries if e["method"] is not None]  # others are of real images or a folder
    empty = [key for key in DRAWN if len({e[key] for e in samples}) < 2]
    empty += [] if any(e[VARIANT] for e in entries) else [VARIANT]
    return [key for key in KEY_COLUMNS if key not in empty]


def _cost_cell(mean: float | None, spread: float) -> str | None:
    """A number of evaluations: whole where it is, with its spread where repeats differ."""
    if mean is None:
        return None
    number = f"{mean:.1f}".removesuffix(".0")
    return f"{number} (sd {spread:.1f})" if spread > 0 else number
