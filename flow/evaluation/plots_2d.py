"""Figures of 2-D flows in one style: particles, trajectories, velocity field, density, likelihood."""

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine

from flow.evaluation import plots
from flow.evaluation.plots import COLORS

EXTENT = 2.6  # the square from -EXTENT to EXTENT is shown
BINS = 100
ARROWS = 17  # of a side of the velocity field
MAX_ARROW = 4.0  # longer arrows are cut to this length: near t = 1 a field is steep where there is no data
INCH = 2.8  # side of a panel
GRAY = "0.35"


def panels(
    titles: Sequence[str], captions: Sequence[str] = (), rows: int = 1, time: float | None = None, start: str = "noise"
) -> tuple[Figure, list[Axes]]:
    """A figure of square panels, left to right and top to bottom, with a title over and a caption under each.

    With a `time` from 0 to 1 a line below all panels shows where it is between `start`, noise or source, and data.
    """
    columns = math.ceil(len(titles) / rows)
    lines = max((c.count("\n") + 1 for c in captions if c), default=0)
    titled = sum(any(titles[i * columns : (i + 1) * columns]) for i in range(rows))
    foot = 0.3 if time is not None else 0.0
    size = INCH * columns, (INCH + 0.2 * lines) * rows + 0.32 * titled + foot
    layout = ConstrainedLayoutEngine(rect=(0, foot / size[1], 1, 1 - foot / size[1]))
    figure = Figure(figsize=size, dpi=100, layout=layout)
    axes = list(np.ravel(figure.subplots(rows, columns)))
    for i, (ax, title) in enumerate(zip(axes, titles, strict=False)):
        ax.set(xlim=(-EXTENT, EXTENT), ylim=(-EXTENT, EXTENT), xticks=[], yticks=[], aspect="equal")
        ax.spines[:].set_color("0.8")
        ax.set_title(title, fontsize=11)
        if captions:
            ax.set_xlabel(captions[i], fontsize=10, linespacing=1.3)
    for ax in axes[len(titles) :]:
        ax.set_visible(False)
    if time is not None:
        time_line(figure, time, foot / size[1], start)
    return figure, axes


def time_line(figure: Figure, time: float, height: float, start: str) -> None:
    """The line of time from `start` to data in the lowest fraction `height` of a figure."""
    ax = figure.add_axes((0, 0, 1, height))
    ax.set_in_layout(False)
    ax.set(xlim=(0, 1), ylim=(0, 1))
    ax.axis("off")
    left, right = 0.3, 0.7
    here = left + (right - left) * time
    ax.plot([left, right], [0.55, 0.55], color="0.8", linewidth=2, solid_capstyle="round")
    ax.plot([left, here], [0.55, 0.55], color=GRAY, linewidth=2, solid_capstyle="round")
    ax.plot([here], [0.55], "o", color=GRAY, markersize=6)
    ax.text(left - 0.02, 0.5, start, ha="right", va="center", fontsize=10)
    ax.text(right + 0.02, 0.5, "data", ha="left", va="center", fontsize=10)
    ax.text(0.98, 0.5, f"t = {time:.2f}", ha="right", va="center", fontsize=10)


def particles(ax: Axes, x: np.ndarray, start: np.ndarray) -> None:
    """Points [N, 2], colored by the sector that they started in."""
    ax.scatter(x[:, 0], x[:, 1], c=np.array(COLORS)[sector(start)], s=3, linewidths=0, zorder=2)


def paths(ax: Axes, states: np.ndarray) -> None:
    """Trajectories [T, K, 2] of K particles as lines, their ends as dots in the color of the sector where they started."""
    colors = np.array(COLORS)[sector(states[0])]
    if len(states) > 1:
        ax.add_collection(LineCollection(list(states.transpose(1, 0, 2)), colors="black", linewidths=0.7, alpha=0.6, zorder=3))
    ends = states[-1]
    ax.scatter(ends[:, 0], ends[:, 1], c=colors, s=16, linewidths=0.7, edgecolors="black", zorder=4)


def sector(start: np.ndarray) -> np.ndarray:
    """The sixth of the plane, 0 to 5, of points [N, 2]."""
    angle = np.arctan2(start[:, 1], start[:, 0]) % (2 * math.pi)
    return (angle * (3 / math.pi)).astype(int).clip(max=5)


def arrows(ax: Axes, v: np.ndarray) -> None:
    """The velocity [N, 2] at the points of `grid_centers(ARROWS)`."""
    at = grid_centers(ARROWS)
    speed = np.linalg.norm(v, axis=1, keepdims=True)
    v = v * np.minimum(1, MAX_ARROW / np.maximum(speed, 1e-9))
    ax.quiver(at[:, 0], at[:, 1], v[:, 0], v[:, 1], color="0.6", angles="xy", scale_units="xy", scale=10, width=0.006, zorder=1)


def density(ax: Axes, x: np.ndarray) -> None:
    """The histogram of points [N, 2], smoothed by a Gaussian as wide as a cell.

    The color scale ends at the 99.5% quantile of the cells with points.
    """
    count, *_ = np.histogram2d(x[:, 1], x[:, 0], bins=BINS, range=[[-EXTENT, EXTENT]] * 2)
    kernel = np.exp(-0.5 * np.arange(-3, 4) ** 2)
    for axis in (0, 1):
        count = np.apply_along_axis(np.convolve, axis, count, kernel / kernel.sum(), mode="same")
    top = np.quantile(count[count > 0.5], 0.995) if (count > 0.5).any() else 1
    ax.imshow(count, extent=(-EXTENT, EXTENT) * 2, origin="lower", cmap="viridis", vmin=0, vmax=top, interpolation="nearest")


def heatmap(ax: Axes, values: np.ndarray, low: float, high: float):
    """Values [K^2] at the points of `grid_centers(K)` in colors from `low` to `high`; returns what a color bar needs."""
    k = math.isqrt(len(values))
    return ax.imshow(
        values.reshape(k, k), extent=(-EXTENT, EXTENT) * 2, origin="lower", cmap="viridis", vmin=low, vmax=high,
        interpolation="bilinear",
    )  # fmt: skip


def grid_centers(cells: int) -> np.ndarray:
    """The centers of cells x cells squares, [cells^2, 2], row by row from the bottom."""
    line = (np.arange(cells) + 0.5) * (2 * EXTENT / cells) - EXTENT
    x, y = np.meshgrid(line, line)
    return np.stack([x.ravel(), y.ravel()], axis=1)


def save(path: Path, figure: Figure) -> None:
    plots.save(path, figure, dpi=150)
