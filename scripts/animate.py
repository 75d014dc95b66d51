"""Moving and still pictures of a trained flow: `python -m scripts.animate --weights runs/toy_checkerboard --out pictures`.

Flows in the plane get flow.gif (particles in the velocity field, and their density), density.png (the density at six
times), likelihood.png (log-density of the flow, beside the exact one where there is a formula). Image models get
trajectory.gif. With ffmpeg installed each GIF has an MP4 beside it.
"""

from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor

import datasets
import models
from flow import prior, solvers
from flow.engine import cli, images, runtime, snapshot
from flow.engine.generate import SamplerSettings, check, decoded, solver_state, velocity_of
from flow.evaluation import animation, planes
from flow.guidance import FlowModel, GuidedVelocity
from flow.likelihood import log_likelihood
from flow.solvers import DETERMINISTIC
from flow.solvers.adaptive import ADAPTIVE
from flow.solvers.grid import uniform

EXAMPLES = """\
  python -m scripts.animate --weights runs/toy_checkerboard --out pictures
  python -m scripts.animate --weights runs/mnist --out pictures --guidance_scale 1.5 --n 50"""
SECONDS = 4.0  # of a GIF, before its end is held
STRIP = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)
MAP_CELLS = 80  # of a side of the likelihood map
MASS = 0.01  # densities above this share of the highest count as inside the mass


def parse_args():
    parser = cli.Parser(__doc__, EXAMPLES)
    parser.add_argument("--weights", required=True, metavar="PATH", help="run folder, checkpoint folder or .safetensors")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="output folder")
    parser.add_argument("--n", type=cli.at_least(1), help="particles, or images of the grid (default: 4000, or 50)")
    parser.add_argument("--frames", type=cli.at_least(2), default=40, help="of a GIF (default: 40)")
    parser.add_argument("--sampling_method", choices=DETERMINISTIC, default="heun", help="(default: heun)")
    parser.add_argument("--steps_a_frame", type=cli.at_least(1), default=2, help="of the solver (default: 2)")
    parser.add_argument("--guidance_scale", type=cli.scale, default=1.0, help="(default: 1, off)")
    parser.add_argument("--prompts", nargs="+", metavar="TEXT", help="for networks with text, one image after the other")
    parser.add_argument("--seed", type=cli.at_least(0), default=8888, help="of the noise (default: 8888)")
    return parser.parse()


def main() -> None:
    args = parse_args()
    snap = snapshot.load(args.weights, None, args.overrides)
    model = snap.model(models.build, models.codec)
    prompts = tuple(args.prompts) if args.prompts else None
    settings = SamplerSettings(args.sampling_method, guidance_scale=args.guidance_scale, seed=args.seed, prompts=prompts)
    plane = len(snap.image_shape) == 1
    with runtime.blame("animate"):
        check(settings, model.net)
        if plane and model.net.num_classes is not None:
            raise ValueError("--weights: a flow of points with labels has a field for each of them; train one without")
    accelerator = runtime.start_alone("animate")
    runtime.set_threads()
    model.net.to(accelerator.device).eval().requires_grad_(False)
    n = args.n or (4000 if plane else 50)
    velocity = velocity_of(model, range(n), settings, accelerator.device)
    times = uniform(args.frames - 1)
    with runtime.progress(accelerator, len(times) - 1, "trajectory") as bar:
        x0 = solver_state(prior.noise("sample", args.seed, range(n), snap.image_shape), accelerator.device)
        states = trajectory(velocity, x0, times, args.sampling_method, args.steps_a_frame, bar.update)
    if plane:
        made = [*moving_plane(args.out, model, times, states), strip(args.out, times, states)]
        made.append(likelihood_map(args.out, accelerator, model, snap))
    else:
        made = moving_images(args.out, [decoded(accelerator, model, x) for x in states], model.net.num_classes)
    print(f"in {args.out}: {' '.join(made)}")


@torch.inference_mode()
def trajectory(velocity, x0: Tensor, times: list[float], method: str, steps: int, tick=lambda: None) -> list[Tensor]:
    """The states at the times, by so many steps of the method between two of them."""
    states = [x0]
    for t, t_next in pairwise(times):
        between = [t, t_next] if method in ADAPTIVE else [t + (t_next - t) * u for u in uniform(steps)]
        states.append(solvers.solve(velocity, states[-1], between, method).x)
        tick()
    return states


def moving_plane(out: Path, model: FlowModel, times: list[float], states: list[Tensor]) -> list[str]:
    """flow.gif: particles in the velocity field, and their density."""
    points = [x.float().cpu().numpy() for x in states]
    field = plain_velocity(model)
    frames = []
    for t, x in zip(times, points, strict=True):
        figure, (left, right) = planes.panels([f"t = {t:.2f}", "density"])
        planes.arrows(left, lambda at, t=t: field(at, min(t, 0.99)))
        planes.particles(left, x, points[0])
        planes.density(right, x)
        frames.append(animation.rendered(figure))
    return moving(out / "flow.gif", frames)


def strip(out: Path, times: list[float], states: list[Tensor]) -> str:
    """density.png: the density at six times."""
    figure, axes = planes.panels([f"t = {t:g}" for t in STRIP])
    for ax, wanted in zip(axes, STRIP, strict=True):
        nearest = min(range(len(times)), key=lambda i, wanted=wanted: abs(times[i] - wanted))
        planes.density(ax, states[nearest].float().cpu().numpy())
    planes.save(out / "density.png", figure)
    return "density.png"


def likelihood_map(out: Path, accelerator: Accelerator, model: FlowModel, snap: snapshot.Snapshot) -> str:
    """likelihood.png: log-density of the flow by the exact divergence, beside the exact density where there is one."""
    at = solver_state(torch.from_numpy(planes.mesh(MAP_CELLS)), accelerator.device)
    velocity = velocity_of(model, range(len(at)), SamplerSettings(), accelerator.device)
    found = log_likelihood(velocity, at, rtol=1e-4, atol=1e-4)[0].cpu()
    source = snap.config.data
    with runtime.blame("data"):
        data = datasets.build(source.name, source.root, source.args) if source.name == "toys" else None
    exact = data.log_density(at.cpu()) if data is not None and data.log_density else None
    shown = [("log-density of the flow", found)]
    note = ""
    if exact is not None:
        inside = exact > exact.max() + np.log(MASS)
        error = (found - exact)[inside].abs().mean().item()
        note = f"mean |difference| inside: {error:.3f} nats"
        shown.append(("exact log-density", exact))
        print(f"log-density: mean absolute error {error:.4f} nats where the exact density is above {MASS:.0%} of its highest")
    high = max(values.max().item() for _, values in shown)
    figure, axes = planes.panels([title for title, _ in shown], [note, ""][: len(shown)])
    for ax, (_, values) in zip(axes, shown, strict=True):
        colours = planes.map_of(ax, values.clamp(min=-1e3).numpy(), high - 8, high)
    figure.colorbar(colours, ax=axes, shrink=0.8, label="nats")
    planes.save(out / "likelihood.png", figure)
    return "likelihood.png"


def moving_images(out: Path, states: list[Tensor], classes: int | None) -> list[str]:
    """trajectory.gif: the grid of images on its way from noise."""
    columns = classes or 10
    frames = [images.grid(images.to_uint8(x).cpu(), columns).permute(1, 2, 0).numpy() for x in states]
    return moving(out / "trajectory.gif", [np.repeat(f, 3, axis=2) if f.shape[2] == 1 else f for f in frames])


def moving(path: Path, frames: list[np.ndarray]) -> list[str]:
    """The names of the files that the frames were written to."""
    animation.write_gif(path, frames, SECONDS)
    video = path.with_suffix(".mp4")
    return [path.name, *([video.name] if animation.write_mp4(video, frames, SECONDS) else [])]


def plain_velocity(model: FlowModel):
    """velocity(points [N, 2], t) in numpy."""
    device = next(model.net.parameters()).device

    @torch.inference_mode()
    def velocity(at: np.ndarray, t: float) -> np.ndarray:
        return GuidedVelocity(model)(torch.from_numpy(at).to(device), t).cpu().numpy()

    return velocity


if __name__ == "__main__":
    runtime.run(main)
