"""Run folders with what a report reads of them, made without a training."""

import json
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from flow.sampling import trajectory_grids

HOSTILE = '<script>alert("x")</script>'
ROW = {
    "weights": "run@10", "method": "heun", "steps": 5, "guidance_scale": 1.0, "n": 100, "first": 0, "identity": {"seed": 1},
    "requested": ["fid"], "NFE": 9, "forwards": 9, "metrics": {"FD-digits": 4.25, "precision": 0.5},
    "standard_errors": {"FD-digits": 0.5}, "seconds": 1.0,
}  # fmt: skip
CONTROL = {**ROW, "weights": "real (test split)", "method": None, "NFE": None, "forwards": None, "steps": None,
           "metrics": {"FD-digits": 1.125}, "standard_errors": {}}  # fmt: skip


def make_run(folder: Path, rows: int = 10, lr: str = "0.001", ended: str = "finished step") -> Path:
    """A run folder with everything that a report reads."""
    for name in ("samples", "evaluation", "snapshots"):
        (folder / name).mkdir(parents=True)
    (folder / "config.yaml").write_text(f"data:\n  name: digits\noptimizer:\n  lr: {lr}\ntrain:\n  steps: {rows}\n")
    start = {"time": "2026-01-02T03:04:05+0000", "command": "train.py -c x.yaml", "commit": "abcdef0123456789", "device": "cpu",
             "processes": 1}  # fmt: skip
    (folder / "environment.json").write_text(json.dumps([start, start]))
    log = f"device: cpu, precision no, 1 thread(s); run directory: {folder}\n"
    (folder / "log.txt").write_text(log + (f"{folder}: {ended} {rows}, in 1.0 s; x\n" if ended else ""))
    metrics = [
        {"step": k, "loss": 2.0 / k, "loss_t_0.0": 1.0, "grad_norm": 1.0, "learning_rate": 0.1, "images": 8 * k,
         "images_per_second": 4.0}
        for k in range(1, rows + 1)
    ]  # fmt: skip
    metrics.append({"step": rows, "validation_loss": 0.75, "images": 8 * rows})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in metrics))
    (folder / "evaluation/results.jsonl").write_text("".join(json.dumps(row) + "\n" for row in (ROW, CONTROL)))
    for step in (5, 10):
        Image.fromarray(np.full((8, 8), 20 * step, np.uint8)).save(folder / f"samples/step_{step:08d}.png")
    Image.fromarray(np.zeros((6, 9, 3), np.uint8)).save(folder / "evaluation/nfe.png")
    return folder


def add_grids(run: Path, steps: int = 4, scales: tuple[float, ...] = (1.0, 2.0)) -> None:
    """Grids of a trajectory; without scales those of an unconditional network."""
    grids, pictures = [], {}
    for step in range(steps + 1):
        for scale in scales if step and scales else (None,):
            file = f"step_{step}_{scale}.webp"
            grids.append(trajectory_grids.Grid(file, step, step / steps, scale))
            pictures[file] = torch.full((1, 8, 8), int(40 * step + 5 * (scale or 0)) % 256, dtype=torch.uint8)
    content = trajectory_grids.TrajectoryGrids("run@10", "heun", steps, 8888, ("zero", HOSTILE), tuple(grids))
    folder = run / trajectory_grids.FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    trajectory_grids.write(folder, content, pictures)
