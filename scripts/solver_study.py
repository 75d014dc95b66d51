"""How close solvers come to the fine solution for how many evaluations: `python -m scripts.solver_study --weights runs/mnist`.

The distance is the root mean square, over images and pixels, to a dopri5 solution with tight tolerances from the same
noise: a measure of the solver alone that takes seconds. `--num_fid_images N` adds, by evaluate.py, the Frechet distance of N
images, which takes minutes. `--out` gets study.md, study.csv and study.png (with --num_fid_images also fd.png); NFE is counted,
and the order of a row is the slope from the row before.
"""

import csv
import dataclasses
import json
import math
from itertools import groupby

import torch
from accelerate import Accelerator

from configs.errors import UserError
from flow import solvers
from flow.evaluation import evaluate_command, plots, table
from flow.evaluation.entries import distance_name
from flow.model import FlowModel
from flow.runtime import cli, commands, distributed, files, flags, lock, messages
from flow.runtime.errors import cli_main, error_context
from flow.sampling import grid_store, hub, locate, snapshot, sources
from flow.sampling.generate import build_velocity, to_solver_dtype
from flow.sampling.settings import SamplerSettings, build_time_grid, validate
from flow.solvers import FIXED_GRID, time_grids

EXAMPLES = """\
  python -m scripts.solver_study --weights runs/mnist --out runs/mnist/study
  python -m scripts.solver_study --weights runs/mnist --out runs/mnist/orders --float64 --t_end 0.9 --sampling_steps 64 128 256
  python -m scripts.solver_study --weights runs/mnist --methods euler ab2 unipc --grids uniform cosine --nfe 4 6 8 10 \\
      --num_fid_images 2000 --feature_extractor mnist --out runs/mnist/study_10"""


def parse_args():
    parser = cli.Parser(__doc__, EXAMPLES)
    flags.add_config_flag(parser)
    flags.add_weights_flag(parser)
    methods = [m for m in FIXED_GRID if m not in ("ddim", "heun2")]  # which are euler and heun
    flags.add_methods_flag(parser, FIXED_GRID, methods)
    parser.add_argument(
        "--grids", nargs="+", choices=[*time_grids.GRIDS, "optimized"], default=["uniform"], help="(default: uniform)"
    )
    flags.add_step_flags(parser, [4, 8, 16, 32, 64], several=True)
    flags.add_guidance_flag(parser)
    flags.add_labels_flag(parser)
    flags.add_prompts_flag(parser)
    flags.add_count_flag(parser, "--n_images", "number of images", 32)
    flags.add_seed_flag(parser)
    parser.add_argument(
        "--t_end", type=flags.fraction, default=1.0, metavar="T", help="stop there: near the data the order hides (default: 1)"
    )
    parser.add_argument("--float64", action="store_true", help="the network in float64, to see small distances")
    flags.add_count_flag(parser, "--num_fid_images", "Frechet distance of N images (default: none)", least=2)
    flags.add_extractor_flag(parser)
    flags.add_precision_flag(parser, "--num_fid_images")
    flags.add_output_flag(parser)
    args = parser.parse()
    if args.prompts and args.num_fid_images:
        raise UserError("--prompts: does not go with --num_fid_images, whose images have the plain captions of all classes")
    if not args.num_fid_images:
        args.refuse_typed(("feature_extractor", "mixed_precision"), "has no effect without --num_fid_images N; add it")
    return args


def main() -> None:
    args = parse_args()
    if args.t_end == 0 or (args.num_fid_images and args.t_end != 1):
        raise UserError(f"--t_end {args.t_end:g}: must be greater than 0, and 1 with --num_fid_images")
    snap = snapshot.load(args.weights, args.config, args.overrides)
    if args.num_fid_images and snap.space.is_points:
        raise UserError(f"--num_fid_images {args.num_fid_images}: is for images, and these weights are a flow of points")
    base = SamplerSettings(
        guidance_scale=args.guidance_scale, seed=args.seed, labels=flags.labels_of(args.labels, snap.class_names),
        prompts=tuple(args.prompts) if args.prompts else None,
    )  # fmt: skip
    model = snap.model(decode=False)
    with args.naming_flags("solver_study"):
        validate(base, model)
    plan = plan_of(args, snap)
    accelerator = distributed.build_single_process_accelerator("solver_study")
    sources.attach(accelerator, model, None, snap.config.data.root)
    notes = [grid_store.fit_note(snap, dataclasses.replace(each, guidance_scale=args.guidance_scale)) for each in plan]
    for note in filter(None, notes):
        accelerator.print(f"note: {note}")
    with lock.folder(args.out, accelerator):
        study(args, accelerator, snap, model, base, plan)


def plan_of(args, snap: snapshot.Snapshot) -> list[SamplerSettings]:
    """The methods, grids and steps that are compared. Raises UserError for an optimized grid that is not stored."""
    words = args.typed("guidance_scale", "prompts", "labels") + args.overrides
    return [
        SamplerSettings(
            method, n, time_grid=name, times=grid_store.times_of(name, snap, method, n, words)
        )
        for method in args.methods
        for name in args.grids
        for n in flags.num_steps(args, method, args.t_end)
    ]  # fmt: skip


def study(
    args, accelerator: Accelerator, snap: snapshot.Snapshot, model: FlowModel, base: SamplerSettings,
    plan: list[SamplerSettings],
) -> None:  # fmt: skip
    """Write the table and the plots."""
    rows, fine_nfe = distances(args, accelerator, snap, model, base, plan)
    frechet = add_frechet(args, snap, rows) if args.num_fid_images else ""
    calls = ["forwards"] if any(row["forwards"] != row["NFE"] for row in rows) else []
    columns = ["method", "grid", "steps", "NFE", *calls, "distance", "order", *([frechet] if frechet else [])]
    with files.csv_file(args.out / "study.csv") as file:
        writer = csv.DictWriter(file, columns, extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows)
    form = {"distance": ".3g", "order": ".2f", frechet: ".2f"}
    cells = [[format(r[c], form.get(c, "")) for c in columns] for r in rows]
    note = f"{args.n_images} images of seed {args.seed}, guidance {args.guidance_scale:g}, to t = {args.t_end:g}"
    note += f"; {frechet} of {args.num_fid_images:,} images" if frechet else ""
    text = f"{table.markdown([columns, *cells])}\n\n{locate.name_of(args.weights)}: {note}."
    files.write_text(args.out / "study.md", text + "\n")
    plots.error_against_nfe(args.out / "study.png", rows, "distance", "distance to the fine solution")
    (args.out / "fd.png").unlink(missing_ok=True)  # of an earlier study, which this one replaces
    if args.num_fid_images:
        plots.error_against_nfe(args.out / "fd.png", rows, frechet, f"{frechet} of {args.num_fid_images:,} images")
    print(f"{text}\nfine solution: dopri5, NFE {fine_nfe}")
    step = "fit the times of few steps"
    words = args.typed("guidance_scale", "prompts", "labels") + args.overrides
    following = ["-m", "scripts.optimize_grid", "--weights", args.weights, *words]
    if hub.is_reference(args.weights):  # grids lie beside the weights
        step = "copy the weights"
        words = ["--to", hub.name_of(args.weights), "--dtype", "fp32", *args.overrides]
        following = ["-m", "scripts.export", "--weights", args.weights, *words]
    names = "study.md study.csv study.png" + (" fd.png" if args.num_fid_images else "")
    result = f"{names} in {args.out}"
    print(messages.summary(result, args.start, f"{step} with: {commands.command(*following)}"))


@torch.inference_mode()
def distances(
    args, accelerator: Accelerator, snap: snapshot.Snapshot, model: FlowModel, base: SamplerSettings,
    plan: list[SamplerSettings],
) -> tuple[list[dict], int]:  # fmt: skip
    """A row for each of the plan, {method, grid, steps, NFE, forwards, distance, order}, and the NFE of the fine solution."""
    model.net.to(accelerator.device, torch.float64 if args.float64 else None).eval()
    tolerance = 1e-12 if args.float64 else 1e-6
    images = range(args.n_images)
    x0 = to_solver_dtype(model.draw_x0("study", args.seed, images), accelerator.device)
    velocity = build_velocity(model, images, base, accelerator.device)
    rows = []
    with distributed.progress(accelerator, len(plan) + 1, "solutions") as bar:
        with error_context("the fine solution"):
            fine = solvers.solve(velocity, x0, [0.0, args.t_end], "dopri5", rtol=tolerance, atol=tolerance)
        bar.update()
        for settings in plan:
            times = [args.t_end * t for t in build_time_grid(settings, model.path)]
            before = velocity.forwards
            with error_context(f"sampling_method={settings.method}"):
                solution = solvers.solve(velocity, x0, times, settings.method)
            distance = (solution.x - fine.x).square().mean().sqrt().item()
            row = {"method": settings.method, "grid": settings.time_grid, "steps": settings.steps, "settings": settings}
            cost = {"NFE": solution.nfe, "forwards": velocity.forwards - before}
            rows.append({**row, **cost, "distance": distance, "order": math.nan})
            bar.update()
    for _, line in groupby(rows, key=lambda row: row["settings"].title):
        previous = None
        for row in line:
            measured = previous and all(0 < r["distance"] < math.inf for r in (row, previous))
            if measured and row["steps"] != previous["steps"]:
                gained = math.log(previous["distance"] / row["distance"])
                row["order"] = gained / math.log(row["steps"] / previous["steps"])
            previous = row
    return rows, fine.nfe


def add_frechet(args, snap: snapshot.Snapshot, rows: list[dict]) -> str:
    """Give each row its Frechet distance, measured by evaluate.py; returns what the column is called."""
    folder = args.out / "evaluation"
    metrics_of = {}
    for name in args.grids:
        words = commands.evaluate_arguments(
            locate.pinned(args.weights, snap.path), folder, args.overrides, methods=args.methods, nfe=args.nfe,
            sampling_steps=None if args.nfe else args.sampling_steps, time_grid=name, metrics="fid",
            guidance_scale=args.guidance_scale, n_samples=args.num_fid_images, mixed_precision=args.mixed_precision,
            feature_extractor=args.feature_extractor, seed=args.seed, labels=args.labels, no_control=True, config=args.config,
        )  # fmt: skip
        for row in evaluate_command.run(words):
            metrics_of[row["method"], row["steps"], json.dumps(row["identity"]["times"])] = row["metrics"]
    for row in rows:
        settings = row["settings"]
        metrics = metrics_of[settings.title, settings.steps, json.dumps(settings.times)]
        name = distance_name([{"metrics": metrics}])
        row[name] = metrics[name]
    return name


if __name__ == "__main__":
    cli_main(main)
