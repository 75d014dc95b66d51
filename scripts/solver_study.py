"""How close solvers come to the fine solution for how many evaluations: `python -m scripts.solver_study --weights runs/mnist`.

The distance is the root mean square, over images and pixels, to a dopri5 solution with tight tolerances from the same
noise: a measure of the solver alone that takes seconds, where a Frechet distance takes minutes (evaluate.py gives that).
`--out` gets study.md, study.csv and study.png; NFE is counted, and the order of a row is the slope from the row before.
"""

import csv
import math
from itertools import groupby
from pathlib import Path

import torch

import models
from flow import prior, solvers
from flow.engine import cli, files, runtime, snapshot, tuned_grids
from flow.engine.generate import SamplerSettings, check, solver_state, times_of, velocity_of
from flow.evaluation import plots, table
from flow.solvers import ON_A_GRID, grid

EXAMPLES = """\
  python -m scripts.solver_study --weights runs/mnist --out runs/mnist/study
  python -m scripts.solver_study --weights runs/mnist --methods ab2 --grids uniform tuned --sampling_steps 8 --out study"""


def parse_args():
    parser = cli.Parser(__doc__, EXAMPLES)
    parser.add_argument("--weights", required=True, metavar="PATH", help="run folder, checkpoint folder or .safetensors")
    parser.add_argument("--methods", nargs="+", choices=ON_A_GRID, default=ON_A_GRID, help="(default: all)")
    parser.add_argument("--grids", nargs="+", choices=[*grid.GRIDS, "tuned"], default=["uniform"], help="(default: uniform)")
    parser.add_argument("--sampling_steps", nargs="+", type=cli.at_least(1), default=[4, 8, 16, 32, 64])
    parser.add_argument("--guidance_scale", type=cli.scale, default=1.0, help="(default: 1, off)")
    parser.add_argument("--n_images", type=cli.at_least(1), default=32, help="(default: 32)")
    parser.add_argument("--seed", type=cli.at_least(0), default=8888, help="of the noise (default: 8888)")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="output folder")
    return parser.parse()


def main() -> None:
    args = parse_args()
    snap = snapshot.load(args.weights, None, args.overrides)
    model = snap.model(models.build)
    base = SamplerSettings(guidance_scale=args.guidance_scale, seed=args.seed)
    with runtime.blame("solver_study"):
        check(base, model.net)
    plan = []
    for method in args.methods:
        for name in args.grids:
            for n in args.sampling_steps:
                tuned = name == "tuned"
                times = (
                    tuned_grids.load(snap.path, method, n)
                    if tuned
                    else times_of(SamplerSettings(steps=n, grid=name), model.path)
                )
                plan.append((method, name, n, list(times)))
    accelerator = runtime.start()
    runtime.set_threads()
    model.net.to(accelerator.device).eval()
    images = range(args.n_images)
    x0 = solver_state(prior.noise("study", args.seed, images, snap.image_shape), accelerator.device)
    velocity = velocity_of(model, images, base, accelerator.device)
    rows = []
    with torch.inference_mode(), runtime.progress(accelerator, len(plan) + 1, "solutions") as bar:
        fine = solvers.solve(velocity, x0, [0.0, 1.0], "dopri5", rtol=1e-6, atol=1e-6)
        bar.update()
        for method, name, n, times in plan:
            found = solvers.solve(velocity, x0, times, method)
            distance = (found.x - fine.x).square().mean().sqrt().item()
            rows.append({"method": method, "grid": name, "steps": n, "NFE": found.nfe, "distance": distance})
            bar.update()
    for _, line in groupby(rows, key=lambda row: (row["method"], row["grid"])):
        previous = None
        for row in line:
            gained = previous and math.log(previous["distance"] / row["distance"])
            row["order"] = gained / math.log(row["steps"] / previous["steps"]) if previous else None
            previous = row
    args.out.mkdir(parents=True, exist_ok=True)
    with open(args.out / "study.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    cells = [
        [r["method"], r["grid"], str(r["steps"]), str(r["NFE"]), f"{r['distance']:.5f}", f"{r['order'] or math.nan:.2f}"]
        for r in rows
    ]
    text = table.markdown([["method", "grid", "steps", "NFE", "distance", "order"], *cells])
    files.write_text(args.out / "study.md", text + "\n")
    plots.error_against_nfe(args.out / "study.png", rows)
    print(f"{text}\nfine solution: dopri5, NFE {fine.nfe}; in {args.out}: study.md study.csv study.png")


if __name__ == "__main__":
    runtime.run(main)
