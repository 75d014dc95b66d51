"""Animations and figures of a trained flow: `python -m scripts.animate --weights runs/toy --out figures`.

2-D flows get flow.gif (particles in the velocity field, and their density), density.png (the density at six
times), likelihood.png (log-density of the flow by the exact divergence and by Hutchinson's estimate, beside the exact one
where there is a formula). Image models get trajectory.gif. With ffmpeg installed each GIF has an MP4 beside it.

`--trajectory_grids` writes RUN/samples/trajectory in place of these: grids at solver steps and guidance scales, which
scripts.report shows with sliders.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor

from configs.errors import UserError
from datasets import DataSpec
from flow.evaluation import animation, plots_2d
from flow.likelihood import log_likelihood, random_directions
from flow.model import FlowModel
from flow.runtime import cli, commands, distributed, files, flags, lock, messages
from flow.runtime.errors import cli_main, error_context
from flow.sampling import guide, images, snapshot, sources, trajectory_grids
from flow.sampling.conditions import column_names
from flow.sampling.generate import build_velocity, decode, to_solver_dtype, trajectory
from flow.sampling.settings import ALL_TIMES, SamplerSettings, validate
from flow.solvers import DETERMINISTIC, Velocity
from flow.solvers.time_grids import uniform
from flow.source import GAUSSIAN

EXAMPLES = """\
  python -m scripts.animate --weights runs/toy --out figures
  python -m scripts.animate --weights runs/toy_mixture --out figures --figures likelihood --hutchinson_samples 16
  python -m scripts.animate --weights runs/mnist --out figures --guidance_scale 1.5 --n 50
  python -m scripts.animate --weights runs/mnist --trajectory_grids
  python -m scripts.animate --weights runs/mnist --trajectory_grids --guidance_scale 1 2 4 --frames 21"""
FIGURES = ("flow", "density", "likelihood")  # of 2-D flows
FILES = ("flow.gif", "flow.mp4", "density.png", "likelihood.png", "trajectory.gif", "trajectory.mp4")
DIRECTIONS = 4  # random directions per point of likelihood.png
FRAMES, GRIDS = 32, 11  # frames of a GIF; states of --trajectory_grids, from noise to data
GRID_SCALES = (1.0, 1.5, 2.0, 3.0, 5.0)  # of guidance, of --trajectory_grids
GRID_IMAGES = 30  # of --trajectory_grids
SHOWN = 1500  # particles of flow.gif at most: more would hide each other
STRIP = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)
MAP_CELLS = 80  # of a side of the likelihood map
PERCENT = 100
MAP_NATS = 8  # the map shows log-densities down to so many nats below the highest
MASS = 0.01  # densities above this share of the highest count as inside the mass


def parse_args():
    parser = cli.Parser(__doc__, EXAMPLES)
    flags.add_config_flag(parser)
    flags.add_weights_flag(parser)
    flags.add_output_flag(parser, use="output folder; --trajectory_grids has its own in the run folder", required=False)
    flags.add_count_flag(
        parser, "--n", f"particles, or images of the grid (default: 20000, 50, or {GRID_IMAGES} of --trajectory_grids)"
    )
    frames = f"frames of a GIF (default: {FRAMES}), or states of --trajectory_grids (default: {GRIDS})"
    flags.add_count_flag(parser, "--frames", frames, least=2)
    flags.add_method_flag(parser, DETERMINISTIC, "heun")
    flags.add_count_flag(parser, "--steps_a_frame", "steps of the solver between frames", 2)
    parser.add_argument("--figures", nargs="+", choices=FIGURES, help="of points (default: all)")
    flags.add_count_flag(
        parser, "--hutchinson_samples", f"random directions per point of likelihood.png (default: {DIRECTIONS})"
    )
    flags.add_guidance_flags(parser, several=True)
    parser.set_defaults(guidance_scale=None)
    flags.add_prompts_flag(parser)
    flags.add_labels_flag(parser)
    flags.add_source_flag(parser)
    flags.add_seed_flag(parser)
    shown = " ".join(f"{scale:g}" for scale in GRID_SCALES)
    parser.add_argument(
        "--trajectory_grids", action="store_true",
        help="instead: RUN/samples/trajectory, grids for the sliders of scripts.report over solver steps and, with labels or "
        f"prompts, guidance scales (--guidance_scale, default: {shown})",
    )  # fmt: skip
    args = parser.parse()
    if args.out is None and not args.trajectory_grids:
        raise UserError("--out is missing: name a folder; only --trajectory_grids has one of its own")
    if len(args.guidance_scale or ()) > 1 and not args.trajectory_grids:
        scales = " ".join(f"{scale:g}" for scale in args.guidance_scale)
        raise UserError(f"--guidance_scale {scales}: must be one number; --trajectory_grids takes several")
    return args


def main() -> None:
    args = parse_args()
    snap = snapshot.load(args.weights, args.config, args.overrides)
    plane = snap.space.is_points
    check_figure_flags(args, plane)
    model = snap.model()
    guide_name = guide.attach(model, snap, args.guide_weights)
    accelerator = distributed.build_single_process_accelerator("animate")
    sources.attach(accelerator, model, args.source, snap.config.data.root)
    scales = guidance_scales(args, model)
    labels = flags.labels_of(args.labels, snap.class_names)
    settings = [
        SamplerSettings(
            args.sampling_method, guidance_scale=scale, seed=args.seed, labels=labels,
            prompts=tuple(args.prompts) if args.prompts else None,
            guidance_interval=ALL_TIMES if scale == 1 and len(scales) > 1 else tuple(args.guidance_interval),
            guide=None if scale == 1 and len(scales) > 1 else guide_name,
            source=args.source,
        )
        for scale in scales
    ]  # fmt: skip
    with args.naming_flags("animate"):
        for each in settings:
            validate(each, model)
        if plane and model.net.num_classes is not None:
            raise ValueError("--weights: a flow of points with labels has a field for each of them; train one without")
    args.figures = args.figures or FIGURES
    if plane and "likelihood" in args.figures and model.source.name != GAUSSIAN:
        args.figures = [name for name in args.figures if name != "likelihood"]
        reason = f"the density of flow.source.name={model.source.name} is not known"
        if not args.figures:
            raise UserError(f"--figures likelihood: {reason}; choose flow or density")
        print(f"note: no likelihood.png: {reason}")
    out = args.out or folder_of_grids(args.weights)
    for network in model.networks:
        distributed.prepare_model(network, accelerator)
        network.eval().requires_grad_(False)
    with lock.folder(out, accelerator):
        if args.trajectory_grids:
            draw_grids(args, out, accelerator, snap, model, settings)
        else:
            draw(args, accelerator, snap, model, settings[0])


def check_figure_flags(args, plane: bool) -> None:
    """Raises UserError for flags of figures that are not drawn."""
    for flag in ("figures", "hutchinson_samples"):
        if getattr(args, flag) is None:
            continue
        if args.trajectory_grids:
            raise UserError(f"--{flag}: does not go with --trajectory_grids, which draws these grids alone")
        if not plane:
            raise UserError(f"--{flag}: is for flows of points, and --weights is a flow of images; leave it out")
    if args.figures and "likelihood" not in args.figures:
        args.refuse_typed(["hutchinson_samples"], "is for --figures likelihood")
    if args.figures == ["likelihood"]:
        args.refuse_typed(["n", "frames", "steps_a_frame", "sampling_method"], "is for --figures flow and density")


def guidance_scales(args, model: FlowModel) -> list[float]:
    """The scales of the command line, else 1, or several for grids of a network that can be guided."""
    if args.guidance_scale:
        return sorted(set(args.guidance_scale))
    guided = can_guide(model) and model.trained_guidance == 1 and (model.null_is_trained or model.guide)
    return list(GRID_SCALES) if args.trajectory_grids and guided else [1.0]


def can_guide(model: FlowModel) -> bool:
    """Whether the velocity depends on a guidance scale."""
    return bool(model.net.num_classes is not None or model.net.max_prompt_bytes or model.guide)


def folder_of_grids(weights: str) -> Path:
    """samples/trajectory of a run. Raises UserError where the weights are no run folder."""
    if not (Path(weights) / "config.yaml").is_file():
        place = Path("RUN") / trajectory_grids.FOLDER
        raise UserError(f"--weights {weights}: is no run folder, in which the grids would be; give --out {place}")
    return Path(weights) / trajectory_grids.FOLDER


def draw_grids(
    args, out: Path, accelerator: Accelerator, snap: snapshot.Snapshot, model: FlowModel, settings: list[SamplerSettings]
) -> None:
    """Write the grids of --trajectory_grids: one for each state and each of the `settings`, which differ in guidance."""
    n = args.n or (20_000 if snap.space.is_points else GRID_IMAGES)
    every = args.steps_a_frame
    times = uniform(((args.frames or GRIDS) - 1) * every)
    names = column_names(settings[0], snap.class_names, model.net.num_classes)
    grids: list[trajectory_grids.Grid] = []
    figures: dict[str, Tensor] = {}
    with distributed.progress(accelerator, (len(times) - 1) * len(settings), "trajectories (steps)") as bar:
        for each in settings:
            states, _ = trajectory(accelerator, model, range(n), each, times, callback=bar.update)
            for step in range(0, len(times), every):
                scale = None if step == 0 or not can_guide(model) else each.guidance_scale  # noise is the same at every scale
                file = f"step_{step:04d}{'' if scale is None else f'_scale_{scale}'}.webp"
                if file in figures:
                    continue
                visible = snap.space.to_visible(decode(model, accelerator.autocast, states[step]))
                figures[file] = snap.space.picture(visible, len(names) or 10, names)
                grids.append(trajectory_grids.Grid(file, step, times[step], scale))
    title = snap.title(args.weights)
    steps = len(times) - 1
    content = trajectory_grids.TrajectoryGrids(title, args.sampling_method, steps, args.seed, tuple(names), tuple(grids))
    trajectory_grids.write(out, content, figures)
    scales = " ".join(f"{each.guidance_scale:g}" for each in settings) if can_guide(model) else "none"
    result = f"{len(figures)} grids in {out}, of {steps} solver steps, guidance scales: {scales}"
    if out.parts[-2:] == trajectory_grids.FOLDER.parts:
        shown = f"show them with: {commands.command('-m', 'scripts.report', out.parent.parent, '--out', 'report')}"
    else:
        shown = f"scripts.report shows those in RUN/{trajectory_grids.FOLDER}"
    print(messages.summary(result, args.start, shown))


def draw(args, accelerator: Accelerator, snap: snapshot.Snapshot, model: FlowModel, settings: SamplerSettings) -> None:
    """Write the requested figures."""
    plane = snap.space.is_points
    figures = []
    if not plane or {"flow", "density"} & set(args.figures):
        indices = range(args.n or (20_000 if plane else 50))
        times = uniform(((args.frames or FRAMES) - 1) * args.steps_a_frame)
        with distributed.progress(accelerator, len(times) - 1, "trajectory (steps)") as bar:
            states, _ = trajectory(accelerator, model, indices, settings, times, callback=bar.update)
        times, states = times[:: args.steps_a_frame], states[:: args.steps_a_frame]
        if not plane:
            pixels = [images.to_uint8(decode(model, accelerator.autocast, x)).cpu() for x in states]
            figures += moving_images(
                args.out, times, pixels, column_names(settings, snap.class_names, model.net.num_classes), start_name(model)
            )
        if plane and "flow" in args.figures:
            figures += moving_plane(args.out, accelerator, model, settings, times, states)
        if plane and "density" in args.figures:
            figures.append(strip(args.out, times, states))
    if plane and "likelihood" in args.figures:
        figures.append(likelihood_map(args.out, accelerator, model, settings, snap, args.hutchinson_samples or DIRECTIONS))
    earlier = [name for name in FILES if name not in figures and (args.out / name).exists()]
    if earlier:
        print(f"note: {args.out} also holds figures of an earlier call, perhaps of other weights: {' '.join(earlier)}")
    study = ["-m", "scripts.solver_study", "--weights", args.weights, "--out", files.free_folder(args.out / "study")]
    words = commands.condition_flags(1 if settings.guide else settings.guidance_scale)  # it takes no guide
    words += args.typed("config", "prompts", "labels", "seed")
    command = commands.command(*study, *words, *args.overrides)
    print(messages.summary(f"{' '.join(figures)} in {args.out}", args.start, f"compare solvers with: {command}"))


def moving_plane(
    out: Path, accelerator: Accelerator, model: FlowModel, settings: SamplerSettings, times: list[float], states: list[Tensor]
) -> list[str]:
    """flow.gif: particles in the velocity field, and their density."""
    points = [x.float().cpu().numpy() for x in states]
    field = velocity_field(model, settings)
    start = start_name(model)
    frames = []
    with distributed.progress(accelerator, len(times), "flow.gif (frames)") as bar:
        for t, x in zip(times, points, strict=True):
            figure, (left, right) = plots_2d.panels(["particles and velocity", "density"], time=t, start=start)
            plots_2d.arrows(left, field(plots_2d.grid_centers(plots_2d.ARROWS), min(t, 0.99)))
            plots_2d.particles(left, x[:SHOWN], points[0][:SHOWN])
            plots_2d.density(right, x)
            frames.append(animation.figure_to_array(figure))
            bar.update()
    return animation.write(out / "flow.gif", frames)


def strip(out: Path, times: list[float], states: list[Tensor]) -> str:
    """density.png: the density at the times next to those of STRIP."""
    nearest = dict.fromkeys(min(range(len(times)), key=lambda i, t=t: abs(times[i] - t)) for t in STRIP)
    figure, axes = plots_2d.panels([f"t = {times[i]:.3g}" for i in nearest])
    for ax, i in zip(axes, nearest, strict=True):
        plots_2d.density(ax, states[i].float().cpu().numpy())
    plots_2d.save(out / "density.png", figure)
    return "density.png"


def likelihood_map(
    out: Path, accelerator: Accelerator, model: FlowModel, settings: SamplerSettings, snap: snapshot.Snapshot, samples: int
) -> str:
    """likelihood.png: log-density of the flow with the exact divergence and with Hutchinson's estimate of it, beside the
    exact density where there is one, and the mean absolute errors inside the mass."""
    at = to_solver_dtype(torch.from_numpy(plots_2d.grid_centers(MAP_CELLS)), accelerator.device)
    velocity = build_velocity(model, range(len(at)), settings, accelerator.device)
    directions = random_directions(settings.seed, range(len(at)), tuple(at.shape[1:]), samples)
    estimates = {
        "exact divergence": None,
        f"Hutchinson, {samples} sample{'s' * (samples > 1)}": directions.to(at),
    }
    maps: dict[str, Tensor] = {}
    total = PERCENT * len(estimates)
    with (
        distributed.progress(accelerator, total, "likelihood.png (percent of time, of each estimate)") as bar,
        error_context("--figures likelihood"),
    ):
        for k, (name, eps) in enumerate(estimates.items(), start=1):
            watched = reporting_progress(velocity, lambda percent, k=k: bar.update(PERCENT * (k - 1) + percent - bar.n))
            maps[name] = log_likelihood(watched, at, rtol=1e-4, atol=1e-4, eps=eps)[0].cpu()
            bar.update(PERCENT * k - bar.n)
    captions = [""] * len(maps)
    exact = exact_log_density(snap, at.cpu()) if settings.guidance_scale == 1 else None  # guidance changes the density
    if exact is not None:
        inside = exact > exact.max() + np.log(MASS)
        errors = [(values - exact)[inside].abs().mean().item() for values in maps.values()]
        captions = [f"mean |error| {error:.3f} nats" for error in errors] + ["formula of the data"]
        for name, error in zip(maps, errors, strict=True):
            print(
                f"log-density, {name}: mean absolute error {error:.4f} nats inside the mass ({MASS:.0%} of the highest density)"
            )
        maps["exact density"] = exact
    high = (maps["exact divergence"] if exact is None else exact).max().item()
    figure, axes = plots_2d.panels(list(maps), captions if exact is not None else ())
    for ax, values in zip(axes, maps.values(), strict=True):
        color_scale = plots_2d.heatmap(ax, values.clamp(min=-1e3).numpy(), high - MAP_NATS, high)
    figure.colorbar(color_scale, ax=axes, shrink=0.8, label="log-density (nats)")
    plots_2d.save(out / "likelihood.png", figure)
    return "likelihood.png"


def reporting_progress(velocity: Velocity, report: Callable[[int], object]) -> Velocity:
    """The velocity; each call reports how much of the way from t = 1 back to 0 is done, in percent. A step that a solver tries
    again does not lower it."""
    reached = 0.0

    def watched(x: Tensor, t: float, t_next: float) -> Tensor:
        nonlocal reached
        reached = max(reached, PERCENT * (1 - t))  # a solver that is lost asks at NaN, which is not more
        report(int(reached))
        return velocity(x, t, t_next)

    return watched


def exact_log_density(snap: snapshot.Snapshot, at: Tensor) -> Tensor | None:
    """The log-density of the real data at points [N, 2], where it has a formula and the data are here."""
    try:
        snap.check_data()
        with error_context("data"):
            data: Any = DataSpec.of(snap.config.data).behind().build()
    except UserError as error:
        print(f"note: no exact density in likelihood.png: {error}")
        return None
    return data.log_density(at) if getattr(data, "log_density", None) else None


def start_name(model: FlowModel) -> str:
    """What a figure calls the states at t = 0."""
    return "noise" if model.source.name == GAUSSIAN else "source"


def moving_images(out: Path, times: list[float], states: list[Tensor], names: list[str], start: str) -> list[str]:
    """trajectory.gif: the grid of images uint8 [N, C, H, W] on its trajectory from `start`, above a bar of time."""
    frames = []
    for t, x in zip(times, states, strict=True):
        frame = images.labelled_grid(x, len(names) or 10, names).permute(1, 2, 0).numpy()
        frames.append(animation.with_time_bar(frame if frame.shape[2] == 3 else np.repeat(frame, 3, axis=2), t, start))
    return animation.write(out / "trajectory.gif", frames)


def velocity_field(model: FlowModel, settings: SamplerSettings):
    """velocity(points [N, 2], t) in numpy."""
    device = next(model.net.parameters()).device

    @torch.inference_mode()
    def velocity(at: np.ndarray, t: float) -> np.ndarray:
        points = to_solver_dtype(torch.from_numpy(at), device)
        return build_velocity(model, range(len(at)), settings, device)(points, t).cpu().numpy()

    return velocity


if __name__ == "__main__":
    cli_main(main)
