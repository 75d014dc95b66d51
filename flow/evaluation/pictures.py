"""Figures of images: samples beside their nearest training images, pictures in a table."""

import re
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from torch import Tensor

from flow.evaluation import plots
from flow.sampling.images import to_pil

INCHES_A_LETTER = 0.09  # of a title
PAIR_COLUMNS = 8


def closest_images(path: Path, samples: Tensor, training: Tensor, ratios: list[float], title: str) -> None:
    """Samples uint8 [N, C, H, W], each above its nearest training image, as a PNG; over each pair the ratio of their
    distance to the threshold below which a sample counts as a copy."""
    rows = 2 * -(-len(ratios) // PAIR_COLUMNS)
    figure = Figure(figsize=(PAIR_COLUMNS, 1.1 * rows + 0.6), dpi=150, layout="constrained")
    axes = figure.subplots(rows, PAIR_COLUMNS, squeeze=False)
    for ax in axes.flat:
        ax.set_axis_off()
    for k, ratio in enumerate(ratios):
        row, column = 2 * (k // PAIR_COLUMNS), k % PAIR_COLUMNS
        for ax, image in zip(axes[row : row + 2, column], (samples[k], training[k]), strict=True):
            ax.imshow(np.asarray(to_pil(image)), cmap="gray", vmin=0, vmax=255, interpolation="nearest")
        axes[row, column].set_title(f"{ratio:.2f}", fontsize=9, color=plots.COLORS[1] if ratio < 1 else "black")
    figure.suptitle(
        f"{title}: samples, below each its nearest training image;\ndistance / threshold (below 1: counted as a copy)",
        fontsize=9,
    )
    plots.save(path, figure)


def picture_table(path: Path, pictures: list[list[np.ndarray]], rows: list[str], columns: list[str]) -> None:
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
    plots.save(path, figure)


def _lines(title: str, letters: int) -> list[str]:
    """The title in lines of so many letters where it can be cut: after a space, a comma, + and _."""
    lines = [""]
    for piece in re.findall(r"[^\s_+]+[\s_+]?", title):
        if lines[-1] and len(lines[-1] + piece.rstrip()) > letters:
            lines.append("")
        lines[-1] += piece
    return [line.strip() for line in lines]
