"""The comparison at the end of scripts/rectify/: comparison.md, comparison.png and the best row of the table."""

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from tqdm import tqdm

from configs.rectify import RectifyConfig, RouteConfig
from flow.evaluation import pictures, table
from flow.evaluation.entries import aggregate, distance_name, model_key
from flow.evaluation.results import is_control
from flow.evaluation.straightness import mean_straightness_deviation
from flow.guidance import network_calls
from flow.model import FlowModel
from flow.runtime import distributed, files
from flow.sampling import images, snapshot
from flow.sampling.generate import generate
from flow.sampling.settings import SamplerSettings
from scripts.rectify.routes import Cost, first_config

SHOWN_NFE = (1, 2)  # rows of the figure, and the largest of the table
COLUMNS = 8  # images of a class in a panel of the figure


@dataclass
class Row:
    """A row of the table."""

    title: str
    route: RouteConfig
    scale: float
    method: str

    @property
    def network(self) -> str:
        return self.route.stages[-1]


@dataclass
class Measured:
    """What is measured of a row here, beside the distances of evaluate.py."""

    row: Row
    key: str  # `model_key` of its distances
    straightness: str  # deviation ± standard error
    panels: list[np.ndarray]  # a picture for each NFE of the figure


def table_rows(cfg: RectifyConfig) -> list[Row]:
    rows = []
    for name, route in cfg.routes.items():
        for scale in route.guidance_scale:
            for method in route.methods:
                guided = f", w = {scale:g}" if scale != 1 else ""
                by = f", {method}" if method != "euler" else ""
                rows.append(Row(name + guided + by, route, scale, method))
    return rows


def compare(cfg: RectifyConfig, folder: Path, rows: list[Row], costs: dict[str, Cost], results: list[dict]) -> Row:
    """Write and print comparison.md, draw comparison.png. The row of the smallest distance at the smallest NFE.

    costs: of the route to each network. results: the rows of evaluate.py, those of real images among them.
    """
    measured = measure_rows(cfg, folder, rows)
    entries = aggregate([row for row in results if not is_control(row)])
    text = table_text(cfg, measured, costs, entries)
    files.write_text(folder / "comparison.md", f"{text}\n")
    draw(folder / "comparison.png", cfg, measured)
    print(f"\n{text}")
    return best_row(cfg, measured, entries)


def measure_rows(cfg: RectifyConfig, folder: Path, rows: list[Row]) -> list[Measured]:
    accelerator = distributed.build_accelerator(first_config(cfg).train.mixed_precision)
    classes = snapshot.load(folder / rows[0].network).model(decode=False).net.num_classes
    shown = COLUMNS * classes if classes else 10 * COLUMNS
    each = cfg.straightness_images * cfg.straightness_steps + shown * sum(figure_nfes(cfg))
    total = sum(each * network_calls(row.scale) for row in rows)
    bar = distributed.progress(accelerator, total, "straightness deviation and figure (network calls)")
    measured = [measure(accelerator, cfg, folder, row, bar) for row in rows]
    bar.close()
    return measured


def measure(accelerator: Accelerator, cfg: RectifyConfig, folder: Path, row: Row, bar: tqdm) -> Measured:
    snap = snapshot.load(folder / row.network)
    model = snap.model()
    distributed.prepare_model(model.net, accelerator)

    def advance(net, inputs, output) -> None:  # what a hook returns would replace the output
        bar.update(len(inputs[0]))

    model.net.register_forward_hook(advance)
    entry = {"weights": f"{row.network}@{snap.step}", "guidance_scale": row.scale, "method": row.method}
    settings = SamplerSettings(guidance_scale=row.scale)
    indices = range(cfg.straightness_images)
    mean, error = mean_straightness_deviation(accelerator, model, indices, settings, cfg.straightness_steps)
    panels = [panel(accelerator, model, row.method, n, row.scale) for n in figure_nfes(cfg)]
    return Measured(row, model_key(entry), f"{mean:.4f} ± {error:.4f}", panels)


def figure_nfes(cfg: RectifyConfig) -> list[int]:
    """The rows of the figure: the first numbers of steps of the table, and the largest."""
    return sorted({nfe for nfe in SHOWN_NFE if nfe in cfg.nfe} | {max(cfg.nfe)})


def table_text(cfg: RectifyConfig, measured: list[Measured], costs: dict[str, Cost], entries: list[dict]) -> str:
    """The table as Markdown, and a note on what its columns mean. entries: of `aggregate`."""
    distance = distance_name(entries)
    metrics = [distance, "accuracy"] if all("accuracy" in e["metrics"] for e in entries) else [distance]
    cost = {m.row.title: costs[m.row.network] for m in measured}
    extra = {
        "images": {title: f"{c.images:,}" for title, c in cost.items()},
        "minutes": {title: "unknown" if math.isnan(c.minutes) else f"{c.minutes:.1f}" for title, c in cost.items()},
        "network passes": {title: f"{c.passes / 1e6:.2f} M" for title, c in cost.items()},
        "straightness deviation": {m.row.title: m.straightness for m in measured},
    }
    text = table.by_nfe(entries, metrics, titles_of(measured), extra)
    note = (
        f"Cells: {' / '.join(metrics)} of {cfg.n_samples:,} images, Euler steps where no method is named. Images, minutes and "
        "network passes are those of the whole route, teachers and pairs included; a backward pass counts as two, a "
        f"derivative too. Straightness deviation: its mean over {cfg.straightness_images} images ± standard error; 0: straight."
    )
    if any(network_calls(m.row.scale) == 2 for m in measured):
        note += " With guidance (w) each velocity evaluation is two network calls, so NFE 2 costs four."
    return f"{text}\n\n{note}"


def titles_of(measured: list[Measured]) -> dict[str, str]:
    """The titles of the rows by `model_key`."""
    return {m.key: m.row.title for m in measured}


def best_row(cfg: RectifyConfig, measured: list[Measured], entries: list[dict]) -> Row:
    """The row of the smallest distance at the smallest NFE."""
    distance = distance_name(entries)
    rows = {m.key: m.row for m in measured}
    fewest = [e for e in entries if e["NFE"] == min(cfg.nfe)]
    return rows[model_key(min(fewest, key=lambda e: e["metrics"][distance].mean))]


def draw(path: Path, cfg: RectifyConfig, measured: list[Measured]) -> None:
    """A row for each NFE of the figure, a column for each row of the table."""
    by_nfe = [list(panels) for panels in zip(*(m.panels for m in measured), strict=True)]
    titles = list(titles_of(measured).values())
    pictures.picture_table(path, by_nfe, [f"NFE {n}" for n in figure_nfes(cfg)], titles)


def panel(accelerator: Accelerator, model: FlowModel, method: str, steps: int, scale: float) -> np.ndarray:
    """A row a class (without classes: ten rows), each column from one and the same noise: uint8 [H, W] or [H, W, 3]."""
    shown = []
    for label in range(model.net.num_classes or 1):
        labels = (label,) if model.net.num_classes else None
        settings = SamplerSettings(method, steps, scale, labels=labels)
        n = COLUMNS if model.net.num_classes else 10 * COLUMNS
        shown += [batch.images for batch in generate(accelerator, model, [range(n)], settings)]
    picture = images.grid(torch.cat(shown), COLUMNS, zoomed=False).permute(1, 2, 0).numpy()
    return picture[:, :, 0] if picture.shape[2] == 1 else picture
