"""Figures of tables, losses and samples side by side."""

import re
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, FixedLocator, LogLocator, MaxNLocator, NullLocator

from flow.evaluation.table import is_control, run_of

matplotlib.use("Agg")

# Okabe & Ito's colors, safe for color-blind readers; every line also has its own marker.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = "osD^vPX"


# The horizontal axis: with guidance a velocity evaluation is two network calls, and calls are what takes time.
NFE = "velocity evaluations per image (NFE), each one network call"
CALLS = "network calls per image (forwards), with guidance two for each NFE"
WIDTH = 7.0  # of a figure, in inches


def distance_against_nfe(path: Path, entries: list[dict]) -> None:
    """The first Frechet distance of the table, for points their SW2, against its cost; `path` is a PNG.

    The cost is the NFE or, where guidance makes the two differ, the number of network calls. There is a line for each
    (weights, method, guidance scale), and a dashed one for real images. Writes nothing where fewer than two entries have a
    distance.
    """
    points, name = _with_distance(entries, "NFE")
    if len(points) < 2:
        return
    lines: dict[str, list[dict]] = {}
    several = {key: len({e[key] for e in points}) > 1 for key in ("weights", "captions", "guidance_scale")}
    for e in points:
        label = e["method"]
        if several["guidance_scale"] and e["guidance_scale"] is not None:
            label += f", guidance {e['guidance_scale']:g}"
        label += f", {e['captions']} captions" if several["captions"] else ""
        label = f"{e['weights']}: {label}" if several["weights"] else label
        lines.setdefault(label, []).append(e)
    figure, axes = _figure(len(lines))
    cost, title = _cost_axis(points)
    _distance_lines(axes, lines, cost, name)
    _real_images(axes, entries, name)
    _cost_scale(axes, title, [e[cost] for e in points])
    _value_scale(axes)
    axes.set_ylabel(f"{name}, lower is better")
    _legend(figure, axes)
    figure.savefig(path)


def distance_against_images(path: Path, entries: list[dict]) -> None:
    """The first distance of the table against the training images that the snapshots of a run have seen; `path` is a PNG.

    There is a line for each (run, method, steps, guidance scale) with at least two snapshots, with the intervals of its
    values, and a dashed one for real images. Writes nothing where there is no such line.
    """
    points, name = _with_distance(entries, "images")
    lines: dict[str, list[dict]] = {}
    several = {key: len({e[key] for e in points}) > 1 for key in ("captions", "guidance_scale", "n")}
    runs = {run_of(e) for e in points}
    for e in points:
        label = e["method"] if e["steps"] is None else f"{e['method']}, {e['steps']} step{'s' * (e['steps'] > 1)}"
        if several["guidance_scale"] and e["guidance_scale"] is not None:
            label += f", guidance {e['guidance_scale']:g}"
        label += f", {e['captions']} captions" if several["captions"] else ""
        label += f", n = {e['n']}" if several["n"] else ""
        label = f"{run_of(e)}: {label}" if len(runs) > 1 else label
        lines.setdefault(label, []).append(e)
    lines = {label: line for label, line in lines.items() if len({e["images"] for e in line}) > 1}
    if not lines:
        return
    figure, axes = _figure(len(lines))
    _distance_lines(axes, lines, "images", name)
    _real_images(axes, entries, name)
    _value_scale(axes)
    axes.set_xlim(left=0)
    _count_scale(axes, "training images")
    axes.set_ylabel(f"{name}, lower is better")
    _legend(figure, axes)
    figure.savefig(path)


def distance_against_minutes(
    path: Path, curves: dict[str, list[tuple[float, list[float]]]], distance: str, floors: list[float]
) -> None:
    """Curves {recipe: [(minutes of training, distance of each seed), ...]} as a PNG: means, bars from the smallest to the
    largest seed, and a dashed line for real images."""
    figure, axes = _figure(len(curves))
    for i, (name, points) in enumerate(curves.items()):
        means = [sum(values) / len(values) for _, values in points]
        bars = [
            [mean - min(values) for mean, (_, values) in zip(means, points, strict=True)],
            [max(values) - mean for mean, (_, values) in zip(means, points, strict=True)],
        ]
        axes.errorbar([minutes for minutes, _ in points], means, yerr=bars, capsize=3, label=name, **_look(i))
    for floor in floors:
        axes.axhline(floor, color="0.4", linestyle="--", linewidth=1, label="real images")
    _value_scale(axes)
    axes.set_xlim(left=0)
    axes.set_xlabel("minutes of training steps")
    axes.set_ylabel(f"{distance}, lower is better")
    _legend(figure, axes)
    figure.savefig(path)


def error_against_nfe(path: Path, rows: list[dict], key: str, label: str) -> None:
    """row[key] of the rows of a solver study, {method, grid, NFE, forwards, ...}, as a PNG: a line a (method, grid)."""
    lines: dict[str, list[dict]] = {}
    several = len({row["grid"] for row in rows}) > 1
    cost, title = _cost_axis(rows)
    for row in rows:
        lines.setdefault(f"{row['method']}, {row['grid']}" if several else row["method"], []).append(row)
    figure, axes = _figure(len(lines))
    for i, (name, line) in enumerate(lines.items()):
        line.sort(key=lambda row: row[cost])
        axes.plot([row[cost] for row in line], [row[key] for row in line], label=name, linewidth=1, **_look(i))
    _cost_scale(axes, title, [row[cost] for row in rows])
    _value_scale(axes)
    axes.set_ylabel(label)
    _legend(figure, axes)
    figure.savefig(path)


def _with_distance(entries: list[dict], axis: str) -> tuple[list[dict], str]:
    """The entries with a number on this axis and the first distance of the table, and its name."""
    names = [name for e in entries for name in e["metrics"] if name.startswith(("FID", "FD-", "SW2"))]
    return [e for e in entries if e[axis] and names and names[0] in e["metrics"]], names[0] if names else ""


def _distance_lines(axes: Axes, lines: dict[str, list[dict]], axis: str, name: str) -> None:
    """A line with bars for each label: 95 % intervals, else standard deviations over ranges."""
    for i, (label, line) in enumerate(lines.items()):
        line.sort(key=lambda e: e[axis])
        values = [e["metrics"][name] for e in line]
        bars = [next((bar for bar in (value.interval, value.std) if bar > 0), 0) for value in values]
        x, means = [e[axis] for e in line], [value.mean for value in values]
        axes.errorbar(x, means, yerr=bars if any(bars) else None, capsize=3, label=label, **_look(i))


def _real_images(axes: Axes, entries: list[dict], name: str) -> None:
    """A dashed line for each row of real images."""
    for i, e in enumerate(e for e in entries if is_control(e) and name in e["metrics"]):
        floor = e["metrics"][name].mean
        if floor > 0:  # the axis is logarithmic
            axes.axhline(floor, color="0.4", linestyle=("--", ":")[i % 2], linewidth=1, label=f"{e['weights']}, n = {e['n']}")


def _count_scale(axes: Axes, title: str) -> None:
    """A linear horizontal axis of steps or images."""
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.set_xlabel(title)


def _figure(lines: int) -> tuple[Figure, Axes]:
    """A figure for so many lines, with room for their names below."""
    figure = Figure(figsize=(WIDTH, 4.2 + 0.2 * -(-lines // 2)), dpi=150, layout="constrained")
    return figure, figure.subplots()


def _legend(figure: Figure, axes: Axes) -> None:
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, frameon=False, fontsize=9, loc="outside lower center", ncols=2)


def _look(i: int) -> dict[str, Any]:
    """Color, marker and dashes of line i."""
    dashes = "-" if i < len(COLORS) else "--"
    return {"color": COLORS[i % len(COLORS)], "marker": MARKERS[i % len(MARKERS)], "markersize": 5, "linestyle": dashes}


def _cost_axis(rows: list[dict]) -> tuple[str, str]:
    """The key of the horizontal axis, and its title."""
    return ("NFE", NFE) if all(row.get("forwards") in (None, row["NFE"]) for row in rows) else ("forwards", CALLS)


def _cost_scale(axes: Axes, title: str, values: Sequence[float]) -> None:
    """A logarithmic horizontal axis with a tick at each measured number, and its label where there is room."""
    axes.set_xscale("log")
    axes.set_xlabel(title)
    axes.set_xlim(min(values) / 1.15, max(values) * 1.15)
    measured = sorted(set(values))
    low, high = np.log(axes.get_xlim())
    width = 0.85 * WIDTH * 72  # of the axes, in points
    place = [(np.log(v) - low) / (high - low) * width for v in measured]
    size = [6.5 * len(_short(v)) + 6 for v in measured]  # points of a label with its gap
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
    axes.xaxis.set_major_formatter(lambda value, _: _short(value))
    axes.xaxis.set_minor_formatter("")
    axes.grid(alpha=0.3)


def _short(value: float) -> str:
    return f"{value:.1f}".removesuffix(".0")


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
            width, dashes = (1, "--") if label in validation else (smooth, "-")
            means = [sum(window := values[max(0, k + 1 - width) : k + 1]) / len(window) for k in range(len(values))]
            color, marker = COLORS[i % len(COLORS)], "o" if len(x) == 1 else None
            axes.plot(x, means, dashes, label=label, color=color, linewidth=1.2, marker=marker)
            i += 1
        _value_scale(axes)
        _count_scale(axes, "optimizer steps" if against == "step" else "training images")
        axes.set_ylabel(loss)
        axes.legend(frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


INCHES_A_LETTER = 0.09  # of a title


def _lines(title: str, letters: int) -> list[str]:
    """The title in lines of so many letters where it can be cut: after a space, a comma, + and _."""
    lines = [""]
    for piece in re.findall(r"[^\s_+]+[\s_+]?", title):
        if lines[-1] and len(lines[-1] + piece.rstrip()) > letters:
            lines.append("")
        lines[-1] += piece
    return [line.strip() for line in lines]


def panels(path: Path, pictures: list[list[np.ndarray]], rows: list[str], columns: list[str]) -> None:
    """Pictures uint8 [H, W] or [H, W, 3] in rows and columns with their names, as a PNG without resampling blur."""
    height, width = pictures[0][0].shape[:2]
    scale = 2 / 150  # inches a pixel: each is two pixels of the file
    titles = [_lines(column, max(8, int(width * scale / INCHES_A_LETTER))) for column in columns]
    top = 0.2 * (1 + max(len(title) for title in titles))
    figure = Figure(
        figsize=(len(columns) * width * scale + 0.5, len(rows) * height * scale + top), dpi=150, layout="constrained"
    )
    axes = figure.subplots(len(rows), len(columns), squeeze=False)
    for i, row in enumerate(rows):
        for j in range(len(columns)):
            ax = axes[i][j]
            ax.imshow(pictures[i][j], cmap="gray", vmin=0, vmax=255, interpolation="nearest")
            ax.set(xticks=[], yticks=[])
            ax.spines[:].set_visible(False)
            if i == 0:
                ax.set_title("\n".join(titles[j]), fontsize=11)
            if j == 0:
                ax.set_ylabel(row, fontsize=11)
    figure.savefig(path)
