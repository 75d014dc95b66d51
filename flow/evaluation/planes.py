"""Pictures of flows in the plane, all in one style: particles, velocity field, density, likelihood."""

import math
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from flow.evaluation.plots import COLOURS

REACH = 2.6  # the square that is shown, from -REACH to REACH
BINS = 100
INCH = 2.8  # side of a panel


def panels(titles: Sequence[str], captions: Sequence[str] = (), rows: int = 1) -> tuple[Figure, list[Axes]]:
    """A figure of square panels, left to right and top to bottom, with a title over and a caption under each."""
    columns = math.ceil(len(titles) / rows)
    height = INCH + 0.35 + (0.25 + 0.17 * max(c.count("\n") for c in captions) if captions else 0)
    figure = Figure(figsize=(INCH * columns, height * rows), dpi=100, layout="constrained")
    axes = list(np.ravel(figure.subplots(rows, columns)))
    for i, (ax, title) in enumerate(zip(axes, titles, strict=False)):
        ax.set(xlim=(-REACH, REACH), ylim=(-REACH, REACH), xticks=[], yticks=[], aspect="equal")
        ax.spines[:].set_color("0.8")
        ax.set_title(title, fontsize=11)
        if captions:
            ax.set_xlabel(captions[i], fontsize=9, linespacing=1.4)
    return figure, axes


def particles(ax: Axes, x: np.ndarray, start: np.ndarray) -> None:
    """Points [N, 2], coloured by the sixth of the plane that they started in, so that one sees where they go."""
    angle = np.arctan2(start[:, 1], start[:, 0]) % (2 * math.pi)
    sixth = (angle * (3 / math.pi)).astype(int).clip(max=5)
    ax.scatter(x[:, 0], x[:, 1], c=np.array(COLOURS)[sixth], s=2, linewidths=0)


def arrows(ax: Axes, velocity: Callable[[np.ndarray], np.ndarray], cells: int = 17) -> None:
    """The velocity [N, 2] at the points of a mesh."""
    at = mesh(cells)
    v = velocity(at)
    ax.quiver(at[:, 0], at[:, 1], v[:, 0], v[:, 1], color="0.35", angles="xy", scale=40, width=0.004)


def density(ax: Axes, x: np.ndarray) -> None:
    """The histogram of points [N, 2]; the colour ends where 1 in 200 of the cells that are not empty are beyond."""
    count, *_ = np.histogram2d(x[:, 1], x[:, 0], bins=BINS, range=[[-REACH, REACH]] * 2)
    top = np.quantile(count[count > 0], 0.995) if count.any() else 1
    ax.imshow(count, extent=(-REACH, REACH) * 2, origin="lower", cmap="viridis", vmin=0, vmax=top, interpolation="nearest")


def map_of(ax: Axes, values: np.ndarray, low: float, high: float):
    """Values [K^2] at the points of `mesh(K)` in colours from `low` to `high`; returns what a colour bar needs."""
    k = math.isqrt(len(values))
    return ax.imshow(
        values.reshape(k, k), extent=(-REACH, REACH) * 2, origin="lower", cmap="viridis", vmin=low, vmax=high,
        interpolation="bilinear",
    )  # fmt: skip


def mesh(cells: int) -> np.ndarray:
    """The centres of cells x cells squares, [cells^2, 2], row by row from below."""
    line = (np.arange(cells) + 0.5) * (2 * REACH / cells) - REACH
    x, y = np.meshgrid(line, line)
    return np.stack([x.ravel(), y.ravel()], axis=1)


def save(path: Path, figure: Figure) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
