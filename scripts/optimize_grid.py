"""Fit the times of few steps to a trained flow: `python -m scripts.optimize_grid --weights runs/mnist --steps 4 8`.

The times are fitted on the flow's own fine trajectories, and saved only where they come closer to the fine solution than every
grid by formula on images that were not used. They are saved beside the snapshot, for `sample.py --time_grid optimized`.
"""

import math
import sys
from functools import partial

import torch
from accelerate import Accelerator
from torch import Tensor
from tqdm import tqdm

from configs.errors import UserError
from flow import solvers
from flow.model import FlowModel
from flow.runtime import cli, commands, distributed, flags, lock, messages
from flow.runtime.errors import cli_main, error_context
from flow.sampling import grid_store, hub, locate, snapshot, sources
from flow.sampling.generate import build_velocity, check_finite, to_solver_dtype
from flow.sampling.settings import SamplerSettings, build_time_grid, validate
from flow.solvers import FIXED_GRID, grid_optimization, time_grids

EXAMPLES = (
    "  python -m scripts.optimize_grid --weights runs/mnist --methods euler ab2 unipc --steps 4 5 6 8 10 --guidance_scale 1.5"
)

PARTS = TO_FIT, TO_DECIDE = 0, 1  # of the images


def parse_args():
    parser = cli.Parser(__doc__, EXAMPLES)
    flags.add_weights_flag(parser)
    flags.add_methods_flag(parser, FIXED_GRID, ["euler", "ab2", "unipc"])
    parser.add_argument("--steps", nargs="+", type=flags.at_least(2), default=[4, 5, 6, 8, 10], help="(default: 4 5 6 8 10)")
    flags.add_guidance_flag(parser)
    flags.add_labels_flag(parser)
    flags.add_prompts_flag(parser)
    flags.add_count_flag(parser, "--n_images", "images to fit on, and as many to decide on", 32, least=2)
    flags.add_count_flag(parser, "--reference_steps", "steps of the fine trajectories", 64, least=16)
    flags.add_count_flag(parser, "--evaluations", "evaluations of the error in a descent", 100)
    flags.add_seed_flag(parser, 1)
    return parser.parse()


def main() -> None:
    args = parse_args()
    if max(args.steps) > args.reference_steps:
        raise UserError(f"--steps {max(args.steps)}: must be at most --reference_steps {args.reference_steps}")
    if hub.is_reference(args.weights):
        words = ["--weights", args.weights, "--to", hub.name_of(args.weights), "--dtype", "fp32", *args.overrides]
        copy = commands.command("-m", "scripts.export", *words)
        raise UserError(f"--weights {args.weights}: grids are stored beside the weights; copy them to a folder with: {copy}")
    snap = snapshot.load(args.weights, None, args.overrides)
    model = snap.model(decode=False)
    prompts = tuple(args.prompts) if args.prompts else None
    labels = flags.labels_of(args.labels, snap.class_names)
    settings = SamplerSettings(guidance_scale=args.guidance_scale, seed=args.seed, labels=labels, prompts=prompts)
    with args.naming_flags("optimize_grid"):
        validate(settings, model)
    accelerator = distributed.build_single_process_accelerator("optimize_grid")
    if note := sources.attach(accelerator, model, None, snap.config.data.root, 2 * args.n_images):  # in two PARTS
        most = (sources.number_of_starts(model.source) or 0) // 2
        raise UserError(f"--n_images {args.n_images}: twice as many are needed, and {note}; use at most {most}")
    distributed.prepare_model(model.net, accelerator)
    model.net.eval()
    with lock.folder(snap.path.parent, accelerator), torch.inference_mode():
        saved = optimize(args, accelerator, snap, model, settings)
    stored = grid_store.read(snap)
    kept = [(method, n) for method in args.methods for n in args.steps if str(n) in stored.get(method, {})]
    result = f"{len(saved)} optimized grid(s) in {grid_store.file_of(snap.path)} are new"
    result += f", {len(kept)} of {len(args.methods) * len(args.steps)} are there"
    print(messages.summary(result, args.start, next_step(args, saved or kept, snap)))


def optimize(
    args, accelerator: Accelerator, snap: snapshot.Snapshot, model: FlowModel, settings: SamplerSettings
) -> list[tuple[str, int]]:
    """Search, decide, save and print a line for each method and number of steps; those that were saved. The folder is locked,
    and a grid of an earlier call is only replaced by a better one."""
    stored = grid_store.read(snap)
    formulas = {
        n: {name: build_time_grid(SamplerSettings(steps=n, time_grid=name), model.path) for name in time_grids.GRIDS}
        for n in args.steps
    }
    # Velocity evaluations, each on one part: of the fine trajectories, and of every method and number of steps at most.
    fine_cost = len(PARTS) * grid_optimization.EVALUATIONS_A_STEP * args.reference_steps
    errors = 2 * (len(time_grids.GRIDS) + 1) + bool(stored) + args.evaluations
    costs = {(method, n): errors * solvers.nfe(method, n) for method in args.methods for n in args.steps}
    saved: list[tuple[str, int]] = []
    with distributed.progress(accelerator, fine_cost + sum(costs.values()), "velocity evaluations") as bar:
        fine = FineSolution(args, accelerator, snap, model, settings, bar)
        bar.write("distance to the fine solution, on images that nothing was fitted to")
        bar.write(f"{'method':>10} {'steps':>5} {'uniform':>9} {'best formula':>24} {'optimized':>9}")
        finished = fine_cost
        for (method, n), cost in costs.items():
            times = search(fine, method, n, formulas[n], args.evaluations)
            held_out = {name: fine.error(TO_DECIDE, method, grid) for name, grid in formulas[n].items()}
            best = min(held_out, key=held_out.__getitem__)
            optimized = fine.error(TO_DECIDE, method, times)
            old = stored.get(method, {}).get(str(n))
            if optimized >= held_out[best]:
                verdict = "  not saved"
            elif old and fine.error(TO_DECIDE, method, old) <= optimized:
                verdict = "  the stored one is no worse"
            else:
                verdict = replaced(snap, method, n, args.guidance_scale)
                grid_store.store(snap, method, times, args.guidance_scale)
                saved.append((method, n))
            formula = f"{best} {held_out[best]:.4f}"
            bar.write(f"{method:>10} {n:>5} {held_out['uniform']:>9.4f} {formula:>24} {optimized:>9.4f}{verdict}")
            finished += cost
            bar.update(finished - bar.n)  # a descent may end early
    return saved


class FineSolution:
    """Fine trajectories of the flow, and how far those of few steps end from them, on each part of the images."""

    def __init__(
        self, args, accelerator: Accelerator, snap: snapshot.Snapshot, model: FlowModel, settings: SamplerSettings, bar: tqdm
    ):
        parts = [range(args.n_images * part, args.n_images * (part + 1)) for part in PARTS]
        draws = [model.draw_x0("tuning", args.seed, part) for part in parts]
        self.bar = bar
        self.noises = [to_solver_dtype(noise, accelerator.device) for noise in draws]
        self.velocities = [build_velocity(model, part, settings, accelerator.device) for part in parts]
        self.trajectories = [
            grid_optimization.reference_trajectory(partial(self.velocity, part), x0, args.reference_steps)
            for part, x0 in enumerate(self.noises)
        ]
        for (states, _), part in zip(self.trajectories, parts, strict=True):
            check_finite(states[-1], part)

    def velocity(self, part: int, x: Tensor, t: float, t_next: float) -> Tensor:
        self.bar.update()
        return self.velocities[part](x, t, t_next)

    def error(self, part: int, method: str, times: list[float]) -> float:
        """Root mean square distance to the fine solution; infinite where a solution of few steps is not finite, as a NaN would
        be neither better nor worse than any other."""
        with error_context(f"sampling_method={method}"):
            end = solvers.solve(partial(self.velocity, part), self.noises[part], times, method).x
        distance = rms(end - self.trajectories[part][0][-1])
        return math.inf if math.isnan(distance) else distance


def search(fine: FineSolution, method: str, n: int, formulas: dict[str, list[float]], evaluations: int) -> list[float]:
    """The times of n steps that a descent ends at; it starts at the best of the formulas and of the path through the fine
    trajectory whose Euler steps leave it by the least."""
    error = partial(fine.error, TO_FIT, method)
    shortest = grid_optimization.dynamic_programming_grid(*fine.trajectories[TO_FIT], n)
    errors = [(error(times), times) for times in (shortest, *formulas.values())]
    least, start = min(errors, key=lambda pair: pair[0])
    return start if least == math.inf else grid_optimization.refine_grid(error, start, evaluations)


def replaced(snap: snapshot.Snapshot, method: str, n: int, guidance_scale: float) -> str:
    """A note on the stored grid, if that was fitted with another guidance scale: there is one for all scales."""
    fitted = grid_store.fitted_scale(snap, method, n)
    return "" if fitted in (None, guidance_scale) else f"  note: replaces the stored one, which was fitted at w = {fitted:g}"


def next_step(args, grids: list[tuple[str, int]], snap: snapshot.Snapshot) -> str:
    """What to do with the grids, or how to find some."""
    if not grids:
        longer = ["--evaluations", str(4 * args.evaluations)]
        return f"search longer with: {commands.command('-m', 'scripts.optimize_grid', *sys.argv[1:], *longer)}"
    method, n = grids[-1]
    words = ["--sampling_method", method, "--sampling_steps", str(n), "--time_grid", "optimized"]
    words += [*args.typed("guidance_scale", "prompts", "labels"), *args.overrides]
    return f"use one with: {commands.sample_command(snap.path, f'{locate.name_of(args.weights)}_optimized', *words)}"


def rms(x: Tensor) -> float:
    return x.square().mean().sqrt().item()


if __name__ == "__main__":
    cli_main(main)
