"""Figures of tables and losses."""

import math
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, FixedLocator, LogLocator, MaxNLocator, NullLocator

from flow.evaluation.entries import DRAWN, GUIDANCE, VARIANT, distance_name, run_of
from flow.evaluation.results import is_control
from flow.runtime import files

matplotlib.use("Agg")

# Okabe & Ito's colors, safe for color-blind readers; every line also has its own marker.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = "osD^vPX"


# The horizontal axis: with guidance a velocity evaluation is two network calls, and calls are what takes time.
NFE = "velocity evaluations per image (NFE), each one network call"
CALLS = "network calls per image (forwards), with guidance two for each NFE"
WIDTH = 7.0  # of a figure, in inches
MEASURED = ("n", "reference", "source", *DRAWN, VARIANT)  # on which a distance depends, beside network, solver and guidance
MAX_LINES = 14  # whose names a legend has room for
HEIGHT = 4.2  # inches of the axes; the names below add to them
TWO_COLUMNS = 44  # letters of the longest name up to which two fit side by side


def distance_against_nfe(path: Path, entries: list[dict]) -> None:
    """The first Frechet distance of the table, for points their SW2, against its cost; `path` is a PNG.

    The cost is the NFE or, where guidance makes the two differ, the number of network calls. There is a line for each
    (weights, method, guidance), with bars of the 95% interval over samples (else of the standard deviation over ranges), and a
    dashed one for real images in a band of theirs. Averages of a width with one point are left to `distance_against_width`, and
    more than MAX_LINES lines to those of two points.
    There is no figure where fewer than two entries are left.
    """
    name = distance_name(entries)
    points = [e for e in entries if e["NFE"] and name in e["metrics"]]
    lines: dict[str, list[dict]] = {}
    several = several_of(points)
    for e in points:
        lines.setdefault(line_name(e, several), []).append(e)
    crowded = len(lines) > MAX_LINES  # of single points, as in a table of many kinds of guidance
    lines = {label: line for label, line in lines.items() if len(line) > 1 or not (crowded or line[0].get("ema_width"))}
    points = [e for line in lines.values() for e in line]
    if len(points) < 2:
        path.unlink(missing_ok=True)  # of a smaller table
        return
    figure, axes = _figure()
    cost, title = _cost_axis(points)
    _distance_lines(axes, lines, cost, name)
    _floors(axes, entries, name)
    _cost_scale(axes, title, [e[cost] for e in points])
    _finish(path, figure, axes, f"{name}, lower is better")


def distance_against_images(path: Path, entries: list[dict]) -> None:
    """The first distance of the table against the training images that the snapshots of a run have seen; `path` is a PNG.

    There is a line for each (run, method, steps, guidance, width of the average) with at least two snapshots, with the
    intervals of its values, and a dashed one for real images. Writes nothing where there is no such line.
    """
    name = distance_name(entries)
    points = [e for e in entries if e["images"] and name in e["metrics"]]
    lines: dict[str, list[dict]] = {}
    several = {key: len({e.get(key) for e in points}) > 1 for key in ("captions", *GUIDANCE, *MEASURED, "ema_width")}
    runs = {run_of(e) for e in points}
    for e in points:
        label = e["method"] if e["steps"] is None else f"{e['method']}, {e['steps']} step{'s' * (e['steps'] > 1)}"
        label += _settings(e, several)
        label = f"{run_of(e)}: {label}" if len(runs) > 1 else label
        lines.setdefault(label, []).append(e)
    lines = {label: line for label, line in lines.items() if len({e["images"] for e in line}) > 1}
    if not lines:
        return
    figure, axes = _figure()
    _distance_lines(axes, lines, "images", name)
    _floors(axes, entries, name)
    axes.set_xlim(left=0)
    _count_scale(axes, "training images")
    _finish(path, figure, axes, f"{name}, lower is better")


def distance_against_scale(path: Path, lines: dict[str, list[dict]], floors: list[dict]) -> None:
    """The first Frechet distance of entries against their guidance scale, a line a name, and those of real images; a PNG."""
    name = distance_name([entry for line in lines.values() for entry in line])
    figure, axes = _figure()
    _distance_lines(axes, lines, "guidance_scale", name)
    _floors(axes, floors, name)
    axes.set_xlabel("guidance scale w")
    _finish(path, figure, axes, f"{name}, lower is better")


def distance_against_width(path: Path, entries: list[dict]) -> None:
    """The first Frechet distance of the table, for points their SW2, against the width of the average; `path` is a PNG.

    There is a line for each run and sampler settings with at least two widths, a dashed one for the run's other average with
    the same settings, where the table has it, and one for real images. Writes nothing where no run has two widths.
    """
    name = distance_name(entries)
    lines: dict[str, list[dict]] = {}
    others: dict[str, dict] = {}
    several = several_of([e for e in entries if e["method"] is not None])
    for e in entries:
        if e["method"] is None or name not in e["metrics"]:
            continue
        shown = {**several, **dict.fromkeys(GUIDANCE, True), "captions": bool(e["captions"])}
        label = f"{e['weights']}: {e['method']}, NFE {_short(e['NFE'])}{_settings(e, shown)}"
        if e["ema_width"] is None:
            others[label] = e
        else:
            lines.setdefault(label, []).append(e)
    lines = {label: line for label, line in lines.items() if len({e["ema_width"] for e in line}) > 1}
    if not lines:
        return
    figure, axes = _figure()
    _distance_lines(axes, lines, "ema_width", name)
    for i, label in enumerate(lines):
        if label in others:
            half_life = others[label]["metrics"][name].mean
            label = f"{label}, half-life average"
            axes.axhline(half_life, color=COLORS[i % len(COLORS)], linestyle="--", linewidth=1, label=label)
    _floors(axes, entries, name)
    widths = [e["ema_width"] for line in lines.values() for e in line]
    _cost_scale(axes, "width of the average (relative standard deviation of its profile)", widths, "{:g}".format)
    _finish(path, figure, axes, f"{name}, lower is better")


def save(path: Path, figure: Figure, **options: Any) -> None:
    """Write the figure as a PNG, whole or not at all."""
    with files.atomic_file(path) as temporary:
        figure.savefig(temporary, format="png", **options)


def several_of(entries: list[dict]) -> dict[str, bool]:
    """The columns that `line_name` may name, and whether the entries have several values of them."""
    return {key: len({e.get(key) for e in entries}) > 1 for key in ("weights", "captions", *GUIDANCE, *MEASURED)}


def line_name(entry: dict, several: dict[str, bool]) -> str:
    """What a line over NFE is called: the method, and what distinguishes the entry from others."""
    name = entry["method"]
    if entry.get("ema_width") is not None:
        name += f", EMA width {entry['ema_width']:g}"
    name += _settings(entry, several)
    return f"{entry['weights']}: {name}" if several["weights"] else name


def _settings(entry: dict, shown: dict[str, bool]) -> str:
    """In a label: the guidance of an entry, the width of its average, its captions and MEASURED, as far as these columns are
    shown."""
    guidance = {"guidance_scale": ", guidance {:g}", "guidance_interval": ", t from {}", "guide": " by {}"}
    measured = {"n": ", n = {}", "reference": " to {}", "source": " from {}", "labels": ", labels {}", "seed": ", seed {}"}
    measured |= {"mixed_precision": ", precision {}", "times": ", times {}", VARIANT: ", variant {}"}

    def formatted(form: dict[str, str]) -> list[str]:
        return [text.format(entry[key]) for key, text in form.items() if shown.get(key) and entry.get(key) is not None]

    parts = [text.partition(" (")[0] for text in formatted(guidance)] + formatted({"ema_width": ", EMA width {:g}"})
    parts += [f", {entry['captions']} captions"] if shown["captions"] and entry["captions"] else []
    return "".join(parts + formatted(measured))


def _distance_lines(axes: Axes, lines: dict[str, list[dict]], key: str, name: str) -> None:
    """The metric `name` of the entries of each line against their `key`, with the 95% interval, else the spread of ranges."""
    for i, (label, line) in enumerate(lines.items()):
        line.sort(key=lambda e: e[key])
        values = [e["metrics"][name] for e in line]
        bars = [next((bar for bar in (value.interval, value.std) if bar > 0), 0) for value in values]
        x, means = [e[key] for e in line], [value.mean for value in values]
        axes.errorbar(x, means, yerr=bars if any(bars) else None, capsize=3, label=_shown(label), **_look(i))


def _floors(axes: Axes, entries: list[dict], name: str) -> None:
    """A line for each row of real images, in the band of its 95% interval."""
    for i, e in enumerate(e for e in entries if is_control(e) and name in e["metrics"]):
        floor, _, interval = e["metrics"][name]
        if floor > 0:  # the axis is logarithmic
            axes.axhline(floor, color="0.4", linestyle=("--", ":")[i % 2], linewidth=1, label=f"{e['weights']}, n = {e['n']}")
            if 0 < interval < floor:
                axes.axhspan(floor - interval, floor + interval, color="0.4", alpha=0.15, linewidth=0)


def distance_in_training(
    path: Path, curves: dict[str, list[tuple[float, list[float]]]], cost: str, distance: str, floors: list[float]
) -> None:
    """Curves {recipe: [(cost so far, distance of each seed), ...]} as a PNG: means, bars from the smallest to the largest seed,
    and a dashed line for real images. `cost` names the unit, e.g. "minutes of training steps"."""
    figure, axes = _figure()
    for i, (name, points) in enumerate(curves.items()):
        means = [sum(values) / len(values) for _, values in points]
        bars = [
            [mean - min(values) for mean, (_, values) in zip(means, points, strict=True)],
            [max(values) - mean for mean, (_, values) in zip(means, points, strict=True)],
        ]
        axes.errorbar([spent for spent, _ in points], means, yerr=bars, capsize=3, label=_shown(name), **_look(i))
    for floor in floors:
        axes.axhline(floor, color="0.4", linestyle="--", linewidth=1, label="real images")
    axes.set_xlim(0, 1.03 * max((spent for points in curves.values() for spent, _ in points), default=1))
    axes.set_xlabel(cost)
    _finish(path, figure, axes, f"{distance}, lower is better")


def error_against_nfe(path: Path, rows: list[dict], key: str, label: str) -> None:
    """row[key] of the rows of a solver study, {method, grid, NFE, forwards, ...}, as a PNG: a line a (method, grid)."""
    lines: dict[str, list[dict]] = {}
    several = len({row["grid"] for row in rows}) > 1
    cost, title = _cost_axis(rows)
    for row in rows:
        lines.setdefault(f"{row['method']}, {row['grid']}" if several else row["method"], []).append(row)
    figure, axes = _figure()
    for i, (name, line) in enumerate(lines.items()):
        line.sort(key=lambda row: row[cost])
        axes.plot([row[cost] for row in line], [row[key] for row in line], label=_shown(name), linewidth=1, **_look(i))
    _cost_scale(axes, title, [row[cost] for row in rows])
    _finish(path, figure, axes, label)


def _count_scale(axes: Axes, title: str) -> None:
    """A linear horizontal axis of steps or images."""
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.set_xlabel(title)


def _figure() -> tuple[Figure, Axes]:
    """A figure that `_finish` gives its height."""
    figure = Figure(figsize=(WIDTH, HEIGHT), dpi=150, layout="constrained")
    return figure, figure.subplots()


def _finish(path: Path, figure: Figure, axes: Axes, title: str) -> None:
    """Scale and name the vertical axis, name the lines below, and write the figure."""
    _value_scale(axes)
    axes.set_ylabel(title)
    handles, labels = axes.get_legend_handles_labels()
    columns = 2 if max(map(len, labels), default=0) <= TWO_COLUMNS else 1
    figure.set_figheight(HEIGHT + 0.2 * math.ceil(len(labels) / columns))
    figure.legend(handles, labels, frameon=False, fontsize=9, loc="outside lower center", ncols=columns)
    save(path, figure)


def _shown(name: str) -> str:
    """The name as a legend shows it: matplotlib leaves out those that begin with an underscore."""
    return f" {name}" if name.startswith("_") else name


def _look(i: int) -> dict[str, Any]:
    """Color, marker and dashes of line i."""
    dashes = "-" if i < len(COLORS) else "--"
    return {"color": COLORS[i % len(COLORS)], "marker": MARKERS[i % len(MARKERS)], "markersize": 5, "linestyle": dashes}


def _cost_axis(rows: list[dict]) -> tuple[str, str]:
    """The key of the horizontal axis, and its title."""
    return ("NFE", NFE) if all(row.get("forwards") in (None, row["NFE"]) for row in rows) else ("forwards", CALLS)


def _short(value: float) -> str:
    return f"{value:.1f}".removesuffix(".0")


def _cost_scale(axes: Axes, title: str, values: Sequence[float], shown: Callable[[float], str] = _short) -> None:
    """A logarithmic horizontal axis with a tick at each measured number, and its label where there is room."""
    axes.set_xscale("log")
    axes.set_xlabel(title)
    axes.set_xlim(min(values) / 1.15, max(values) * 1.15)
    measured = sorted(set(values))
    low, high = np.log(axes.get_xlim())
    width = 0.85 * WIDTH * 72  # of the axes, in points
    place = [(np.log(v) - low) / (high - low) * width for v in measured]
    size = [6.5 * len(shown(v)) + 6 for v in measured]  # points of a label with its gap
    labelled = [0]
    last = len(measured) - 1
    for i in range(1, last):
        clear = (place[i] - place[labelled[-1]] >= (size[i] + size[labelled[-1]]) / 2) and (
            place[last] - place[i] >= (size[i] + size[last]) / 2
        )
        labelled += [i] if clear else []
    labelled += [last] if last else []
    axes.xaxis.set_major_locator(FixedLocator([measured[i] for i in labelled]))
    axes.xaxis.set_minor_locator(FixedLocator(measured))
    axes.xaxis.set_major_formatter(lambda value, _: shown(value))
    axes.xaxis.set_minor_formatter("")
    axes.grid(alpha=0.3)


def _value_scale(axes: Axes) -> None:
    """A logarithmic vertical axis with about three to ten labels; a linear one where there are numbers of 0 or less."""
    values = np.concatenate([np.asarray(line.get_ydata(), float) for line in axes.lines])
    values = values[np.isfinite(values)]
    axes.grid(alpha=0.3)
    if not len(values) or values.min() <= 0:
        return
    axes.set_yscale("log")
    low, high = axes.get_ylim()
    ratio = high / low
    if ratio < 4:
        axes.yaxis.set_major_locator(MaxNLocator(8, steps=(1, 2, 2.5, 5, 10)))
    else:
        bounds = {10: (1, 1.5, 2, 3, 4, 5, 7), 30: (1, 2, 3, 5, 7), 1000: (1, 2, 5)}
        axes.yaxis.set_major_locator(LogLocator(subs=next((subs for bound, subs in bounds.items() if ratio < bound), (1,))))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_locator(NullLocator())


def loss_curves(
    path: Path,
    losses: dict[str, dict[str, tuple[list[float], list[float]]]],
    against: str,
    smooth: int = 1,
    validation: Collection[str] = (),
) -> None:
    """Curves {loss: {label: (steps or images, values)}} as a PNG, each value the mean of the last `smooth` ones.

    There is a panel for each loss, as different losses have different units. The labels in `validation` are dashed and not
    smoothed.
    """
    figure = Figure(figsize=(7, 1 + 3.5 * len(losses)), dpi=150, layout="constrained")
    panels = figure.subplots(len(losses), squeeze=False)[:, 0]
    i = 0
    for axes, (loss, curves) in zip(panels, losses.items(), strict=True):
        for label, (x, values) in curves.items():
            solid = "-" if i < len(COLORS) else "-."  # colors come again
            width, dashes = (1, "--") if label in validation else (smooth, solid)
            means = [sum(window := values[max(0, k + 1 - width) : k + 1]) / len(window) for k in range(len(values))]
            color = COLORS[i % len(COLORS)]
            marker = "o" if len(x) == 1 else None
            axes.plot(x, means, dashes, label=_shown(label), color=color, linewidth=1.2, marker=marker)
            i += 1
        _value_scale(axes)
        _count_scale(axes, "optimizer steps" if against == "step" else "training images")
        axes.set_ylabel(loss)
        axes.legend(frameon=False)
    save(path, figure)
