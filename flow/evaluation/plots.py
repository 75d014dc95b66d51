"""Pictures of tables, losses and samples side by side."""

from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator

from flow.evaluation.table import is_control

matplotlib.use("Agg")

# Okabe & Ito's colours, told apart by colour-blind readers; every line also has its own marker.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = "osD^vPX"


def distance_against_nfe(path: Path, entries: list[dict]) -> None:
    """The first Frechet distance of the table, for points their SW2, against NFE; `path` is a PNG.

    There is a line for each (weights, method, guidance scale), and a dashed one for real images. Writes nothing where fewer
    than two entries have one.
    """
    names = [name for e in entries for name in e["metrics"] if name.startswith(("FID", "FD-", "SW2"))]
    drawn = [e for e in entries if e["NFE"] and names and names[0] in e["metrics"]]
    if len(drawn) < 2:
        return
    lines: dict[str, list[dict]] = {}
    several = {key: len({e[key] for e in drawn}) > 1 for key in ("weights", "captions", "guidance_scale")}
    for e in drawn:
        label = e["method"]
        label += f", guidance {e['guidance_scale']:g}" if several["guidance_scale"] else ""
        label += f", {e['captions']} captions" if several["captions"] else ""
        label = f"{e['weights']}: {label}" if several["weights"] else label
        lines.setdefault(label, []).append(e)
    figure = Figure(figsize=(6, 4), dpi=150, layout="constrained")
    axes = figure.subplots()
    for i, (label, line) in enumerate(lines.items()):
        line.sort(key=lambda e: e["NFE"])
        means, spreads = zip(*(e["metrics"][names[0]] for e in line), strict=True)
        look: dict[str, Any] = {"color": COLOURS[i % len(COLOURS)], "marker": MARKERS[i % len(MARKERS)], "markersize": 5}
        if any(spread > 0 for spread in spreads):
            axes.errorbar(
                [e["NFE"] for e in line], means, yerr=[s if s > 0 else 0 for s in spreads], capsize=3, label=label, **look
            )
        else:
            axes.plot([e["NFE"] for e in line], means, label=label, **look)
    for i, e in enumerate(e for e in entries if is_control(e) and names[0] in e["metrics"]):
        floor = e["metrics"][names[0]][0]
        if floor > 0:  # the axis is logarithmic
            axes.axhline(floor, color="0.4", linestyle=("--", ":")[i % 2], linewidth=1, label=f"{e['weights']}, n = {e['n']}")
    _log_axes(axes)
    axes.set_xlabel("network evaluations per image (NFE)")
    axes.set_ylabel(f"{names[0]}, lower is better")
    axes.legend(frameon=False)
    figure.savefig(path)


def error_against_nfe(path: Path, rows: list[dict], key: str, label: str) -> None:
    """row[key] of the rows of a solver study, {method, grid, NFE, ...}, as a PNG: a line a (method, grid)."""
    figure = Figure(figsize=(7, 5), dpi=150, layout="constrained")
    axes = figure.subplots()
    lines: dict[str, list[dict]] = {}
    several = len({row["grid"] for row in rows}) > 1
    for row in rows:
        lines.setdefault(f"{row['method']}, {row['grid']}" if several else row["method"], []).append(row)
    for i, (name, line) in enumerate(lines.items()):
        line.sort(key=lambda row: row["NFE"])
        axes.plot(
            [row["NFE"] for row in line], [row[key] for row in line], label=name, color=COLOURS[i % len(COLOURS)],
            marker=MARKERS[i % len(MARKERS)], markersize=4, linewidth=1, linestyle="--" if i >= len(COLOURS) else "-",
        )  # fmt: skip
    _log_axes(axes)
    axes.set_xlabel("network evaluations per image (NFE)")
    axes.set_ylabel(label)
    axes.legend(frameon=False, loc="upper left", bbox_to_anchor=(1, 1))
    figure.savefig(path)


def _log_axes(axes: Axes) -> None:
    """Logarithmic axes with as many labels as there is room for."""
    box = axes.dataLim
    for axis, scale, (low, high) in (
        (axes.xaxis, axes.set_xscale, box.intervalx), (axes.yaxis, axes.set_yscale, box.intervaly)
    ):  # fmt: skip
        scale("log")
        span = high / low
        axis.set_major_locator(LogLocator(subs=(1, 2, 3, 5, 7) if span < 30 else (1, 2, 5) if span < 1000 else (1,)))
        axis.set_major_formatter("{x:g}")
        axis.set_minor_locator(NullLocator())
    axes.grid(alpha=0.3)


def loss_curves(path: Path, curves: dict[str, tuple[list[float], list[float]]], against: str, smooth: int = 1) -> None:
    """Curves {label: (steps or images, losses)} as a PNG, each value the mean of the last `smooth` ones."""
    figure = Figure(figsize=(6, 4), dpi=150, layout="constrained")
    axes = figure.subplots()
    for i, (label, (x, losses)) in enumerate(curves.items()):
        means = [sum(window := losses[max(0, k + 1 - smooth) : k + 1]) / len(window) for k in range(len(losses))]
        axes.plot(x, means, label=label, color=COLOURS[i % len(COLOURS)], linewidth=1.2, marker="o" if len(x) == 1 else None)
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 5, 7)))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_locator(MaxNLocator(6))
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.set_xlabel("optimizer steps" if against == "step" else "training images")
    axes.set_ylabel("training loss")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def panels(path: Path, pictures: list[list[np.ndarray]], rows: list[str], columns: list[str]) -> None:
    """Pictures uint8 [H, W] or [H, W, 3] in rows and columns with their names, as a PNG without resampling blur."""
    height, width = pictures[0][0].shape[:2]
    scale = 2 / 150  # inches a pixel: each is two pixels of the file
    size = (len(columns) * width * scale + 0.5, len(rows) * height * scale + 0.4)
    figure = Figure(figsize=size, dpi=150, layout="constrained")
    axes = figure.subplots(len(rows), len(columns), squeeze=False)
    for i, row in enumerate(rows):
        for j, column in enumerate(columns):
            ax = axes[i][j]
            ax.imshow(pictures[i][j], cmap="gray", vmin=0, vmax=255, interpolation="nearest")
            ax.set(xticks=[], yticks=[])
            ax.spines[:].set_visible(False)
            if i == 0:
                ax.set_title(column, fontsize=11)
            if j == 0:
                ax.set_ylabel(row, fontsize=11)
    figure.savefig(path)
