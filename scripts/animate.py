"""Animations and figures of a trained flow: `python -m scripts.animate --weights runs/toy --out pictures`.

2-D flows get flow.gif (particles in the velocity field, and their density), density.png (the density at six
times), likelihood.png (log-density of the flow by the exact divergence and by Hutchinson's estimate, beside the exact one
where there is a formula). Image models get trajectory.gif. With ffmpeg installed each GIF has an MP4 beside it.
"""

from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor

import datasets
from flow import source as sources
from flow.evaluation import animation, plots_2d
from flow.guidance import GuidedVelocity
from flow.likelihood import log_likelihood
from flow.model import FlowModel
from flow.noise import generator
from flow.runtime import cli, distributed, files, lock, subprocesses
from flow.runtime.errors import cli_main, error_context
from flow.sampling import guide, images, snapshot
from flow.sampling.generate import build_velocity, decode, to_solver_dtype, trajectory
from flow.sampling.settings import SamplerSettings, validate
from flow.solvers import DETERMINISTIC
from flow.solvers.time_grids import uniform
from flow.source import GAUSSIAN

EXAMPLES = """\
  python -m scripts.animate --weights runs/toy --out pictures
  python -m scripts.animate --weights runs/toy_mixture --out pictures --pictures likelihood --hutchinson_samples 16
  python -m scripts.animate --weights runs/mnist --out pictures --guidance_scale 1.5 --n 50"""
PICTURES = ("flow", "density", "likelihood")  # of 2-D flows
SHOWN = 1500  # particles of flow.gif at most: more would hide each other
STRIP = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)
MAP_CELLS = 80  # of a side of the likelihood map
MAP_NATS = 8  # below the highest log-density are shown
MASS = 0.01  # densities above this share of the highest count as inside the mass


def parse_args():
    parser = cli.Parser(__doc__, EXAMPLES)
    cli.add_weights_flag(parser)
    cli.add_output_flag(parser)
    cli.add_count_flag(parser, "--n", "particles, or images of the grid (default: 20000, or 50)")
    cli.add_count_flag(parser, "--frames", "frames of a GIF", 32, least=2)
    cli.add_method_flag(parser, DETERMINISTIC, "heun")
    cli.add_count_flag(parser, "--steps_a_frame", "steps of the solver between frames", 2)
    parser.add_argument("--pictures", nargs="+", choices=PICTURES, default=PICTURES, help="of points (default: all)")
    cli.add_count_flag(parser, "--hutchinson_samples", "random directions per point", 4)
    cli.add_guidance_flags(parser)
    cli.add_prompts_flag(parser)
    cli.add_source_flag(parser)
    cli.add_seed_flag(parser)
    return parser.parse()


def main() -> None:
    args = parse_args()
    snap = snapshot.load(args.weights, None, args.overrides)
    model = snap.model()
    guide_name = guide.attach(model, snap, args.guide_weights)
    sources.replace_by(model, args.source, snap.config.data.root, snap.image_shape)
    settings = SamplerSettings(
        args.sampling_method, guidance_scale=args.guidance_scale, seed=args.seed,
        prompts=tuple(args.prompts) if args.prompts else None, guidance_interval=tuple(args.guidance_interval),
        guide=guide_name, source=args.source,
    )  # fmt: skip
    plane = snap.space.is_points
    with error_context("animate"):
        validate(settings, model)
        if plane and model.net.num_classes is not None:
            raise ValueError("--weights: a flow of points with labels has a field for each of them; train one without")
    if plane and "likelihood" in args.pictures and model.source.name != GAUSSIAN:
        args.pictures = [name for name in args.pictures if name != "likelihood"]
        print(f"note: no likelihood.png: the density of flow.source.name={model.source.name} is not known")
    accelerator = distributed.build_single_process_accelerator("animate")
    for network in model.networks:
        distributed.prepare_model(network, accelerator)
        network.eval().requires_grad_(False)
    with lock.folder(args.out, accelerator):
        draw(args, accelerator, snap, model, settings)


def draw(args, accelerator: Accelerator, snap: snapshot.Snapshot, model: FlowModel, settings: SamplerSettings) -> None:
    """Write the requested pictures."""
    plane = snap.space.is_points
    pictures = []
    if not plane or {"flow", "density"} & set(args.pictures):
        indices = range(args.n or (20_000 if plane else 50))
        times = uniform((args.frames - 1) * args.steps_a_frame)
        with distributed.progress(accelerator, len(times) - 1, "trajectory (steps)") as bar:
            states, _ = trajectory(accelerator, model, snap.image_shape, indices, settings, times, callback=bar.update)
        times, states = times[:: args.steps_a_frame], states[:: args.steps_a_frame]
        if not plane:
            pixels = [images.to_uint8(decode(model, accelerator.autocast, x)).cpu() for x in states]
            pictures += moving_images(args.out, times, pixels, margin_of(settings, snap, model.net.num_classes))
        if plane and "flow" in args.pictures:
            pictures += moving_plane(args.out, model, times, states)
        if plane and "density" in args.pictures:
            pictures.append(strip(args.out, times, states))
    if plane and "likelihood" in args.pictures:
        pictures.append(likelihood_map(args.out, accelerator, model, snap, args.hutchinson_samples, args.seed))
    study = ["-m", "scripts.solver_study", "--weights", args.weights, "--out", files.free_folder(args.out / "study")]
    flags = cli.condition_flags(args.guidance_scale, args.prompts)
    command = subprocesses.command(*study, *flags, *args.overrides)
    print(cli.summary(f"{' '.join(pictures)} in {args.out}", args.start, f"compare solvers with: {command}"))


def moving_plane(out: Path, model: FlowModel, times: list[float], states: list[Tensor]) -> list[str]:
    """flow.gif: particles in the velocity field, and their density."""
    points = [x.float().cpu().numpy() for x in states]
    field = plain_velocity(model)
    frames = []
    for t, x in zip(times, points, strict=True):
        figure, (left, right) = plots_2d.panels(["particles and velocity", "density"], time=t)
        plots_2d.arrows(left, field(plots_2d.grid_centers(plots_2d.ARROWS), min(t, 0.99)))
        plots_2d.particles(left, x[:SHOWN], points[0][:SHOWN])
        plots_2d.density(right, x)
        frames.append(animation.figure_to_array(figure))
    return animation.write(out / "flow.gif", frames)


def strip(out: Path, times: list[float], states: list[Tensor]) -> str:
    """density.png: the density at six times."""
    figure, axes = plots_2d.panels([f"t = {t:g}" for t in STRIP])
    for ax, t in zip(axes, STRIP, strict=True):
        nearest = min(range(len(times)), key=lambda i, t=t: abs(times[i] - t))
        plots_2d.density(ax, states[nearest].float().cpu().numpy())
    plots_2d.save(out / "density.png", figure)
    return "density.png"


def likelihood_map(
    out: Path, accelerator: Accelerator, model: FlowModel, snap: snapshot.Snapshot, probes: int, seed: int
) -> str:
    """likelihood.png: log-density of the flow with the exact divergence and with Hutchinson's estimate of it, beside the
    exact density where there is one, and the mean absolute errors inside the mass."""
    at = to_solver_dtype(torch.from_numpy(plots_2d.grid_centers(MAP_CELLS)), accelerator.device)
    velocity = build_velocity(model, range(len(at)), SamplerSettings(), accelerator.device)
    signs = generator("likelihood map", seed).integers(2, size=(probes, *at.shape)) * 2.0 - 1
    estimates = {
        "exact divergence": None,
        f"Hutchinson, {probes} probe{'s' * (probes > 1)}": to_solver_dtype(torch.from_numpy(signs), accelerator.device),
    }
    maps = {name: log_likelihood(velocity, at, rtol=1e-4, atol=1e-4, eps=eps)[0].cpu() for name, eps in estimates.items()}
    captions = [""] * len(maps)
    exact = exact_density(snap, at.cpu())
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


def exact_density(snap: snapshot.Snapshot, at: Tensor) -> Tensor | None:
    """The log-density of the real data at points [N, 2], where it has a formula."""
    snap.check_data()
    source = snap.config.data
    with error_context("data"):
        real = datasets.source_dataset(source.name, source.root, source.args)
        data = datasets.build(real["name"], real["root"], real["args"])
    return data.log_density(at) if getattr(data, "log_density", None) else None


def moving_images(out: Path, times: list[float], states: list[Tensor], names: list[str]) -> list[str]:
    """trajectory.gif: the grid of images uint8 [N, C, H, W] on its trajectory from noise, above a bar of time."""
    frames = []
    for t, x in zip(times, states, strict=True):
        frame = images.labelled_grid(x, len(names) or 10, names).permute(1, 2, 0).numpy()
        frames.append(animation.with_time_bar(frame if frame.shape[2] == 3 else np.repeat(frame, 3, axis=2), t))
    return animation.write(out / "trajectory.gif", frames)


def margin_of(settings: SamplerSettings, snap: snapshot.Snapshot, num_classes: int | None) -> list[str]:
    """The name of each column of images, where there are few: its prompt, or its class."""
    names = snap.class_names
    columns = settings.prompts or [names[k] if k < len(names) else str(k) for k in range(num_classes or 0)]
    return list(columns) if len(columns) <= 20 else []


def plain_velocity(model: FlowModel):
    """velocity(points [N, 2], t) in numpy."""
    device = next(model.net.parameters()).device

    @torch.inference_mode()
    def velocity(at: np.ndarray, t: float) -> np.ndarray:
        return GuidedVelocity(model)(torch.from_numpy(at).to(device), t).cpu().numpy()

    return velocity


if __name__ == "__main__":
    cli_main(main)
