"""2-D flows side by side on the same noise: `python -m scripts.compare --weights runs/a runs/b --out figures`.

A column for each of the weights, a row for each number of steps: where particles go, and some of their trajectories. Under each
panel are its NFE, sliced Wasserstein-2 distance to the data and straightness deviation (0: one Euler step is exact).
`--out` gets compare.gif, compare.png and compare.md; with ffmpeg installed also compare.mp4.
"""

from dataclasses import dataclass

import numpy as np
from accelerate import Accelerator
from matplotlib.figure import Figure
from torch import Tensor

from configs.errors import UserError
from datasets import DataSpec
from flow.evaluation import animation, plots_2d, table
from flow.evaluation.metrics_2d import sliced_wasserstein
from flow.evaluation.straightness import mean_straightness_deviation
from flow.model import FlowModel
from flow.runtime import cli, commands, distributed, files, flags, lock, messages
from flow.runtime.errors import cli_main, error_context
from flow.sampling import locate, snapshot, sources
from flow.sampling.generate import trajectory
from flow.sampling.settings import SamplerSettings, build_time_grid, validate
from flow.solvers import ADAPTIVE, DETERMINISTIC
from flow.solvers.time_grids import uniform
from flow.source import GAUSSIAN

EXAMPLES = """\
  python -m scripts.compare --weights runs/toy runs/toy_reflow --names flow reflow --sampling_steps 1 2 100 --out figures
  python -m scripts.compare --weights runs/independent runs/ot --sampling_method dopri5 --out figures"""
SHOWN = 1000  # particles of a panel
TRAJECTORIES = 40  # of them are drawn as lines
STRAIGHTNESS_STEPS = 100


@dataclass
class Panel:
    """A solution of a flow."""

    name: str  # of the flow
    steps: int | None  # None: chosen by the method
    nfe: int
    distance: float  # sliced Wasserstein-2 to the data
    straightness_deviation: float
    times: list[float]
    states: np.ndarray  # of the particles that are shown at these times, [T, K, 2]

    def at(self, t: float) -> np.ndarray:
        """The trajectories up to t, [T', K, 2], linear between the times, as a step of the solver is."""
        k = max(i for i, time in enumerate(self.times) if time <= t)
        if k == len(self.times) - 1:
            return self.states
        share = (t - self.times[k]) / (self.times[k + 1] - self.times[k])
        return np.concatenate([self.states[: k + 1], [(1 - share) * self.states[k] + share * self.states[k + 1]]])


def parse_args():
    parser = cli.Parser(__doc__, EXAMPLES)
    flags.add_weights_flag(parser, several=True)
    parser.add_argument("--names", nargs="+", metavar="TEXT", help="titles, one for each (default: names of the runs)")
    flags.add_output_flag(parser)
    flags.add_method_flag(parser, DETERMINISTIC, "euler")
    flags.add_step_flags(parser, [2, 100], several=True)
    flags.add_count_flag(parser, "--n_samples", "points of the distance", 10_000, least=2)
    flags.add_count_flag(parser, "--frames", "frames of the GIF", 32, least=2)
    flags.add_source_flag(parser)
    flags.add_seed_flag(parser)
    return parser.parse()


def main() -> None:
    args = parse_args()
    names = args.names or [locate.name_of(path) for path in args.weights]
    if len(names) != len(args.weights):
        raise UserError(f"--names: {len(names)} for {len(args.weights)} weights; give one for each")
    snaps = [snapshot.load(path, None, args.overrides) for path in args.weights]
    if not args.names and len(set(names)) < len(names):  # snapshots of one run
        names = [snap.title(path) for path, snap in zip(args.weights, snaps, strict=True)]
    if not args.names and len(set(names)) < len(names):  # runs of one name in different folders
        names = [str(path) for path in args.weights]
    flows = [snap.model(decode=False) for snap in snaps]
    steps = flags.num_steps(args, args.sampling_method)
    reals = [real_points(path, snap, model) for path, snap, model in zip(args.weights, snaps, flows, strict=True)]
    accelerator = distributed.build_single_process_accelerator("compare")
    for model, snap in zip(flows, snaps, strict=True):
        if note := sources.attach(accelerator, model, args.source, snap.config.data.root, args.n_samples):
            print(f"note: {note}")
    with lock.folder(args.out, accelerator):
        compare(args, accelerator, names, flows, reals, steps)


def compare(
    args, accelerator: Accelerator, names: list[str], flows: list[FlowModel], reals: list[Tensor], steps: list[int]
) -> None:
    """Solve the flows, write the animation, the figure and the table."""
    rows: list[list[Panel]] = [[] for _ in steps]
    with distributed.progress(accelerator, len(flows) * len(steps), "panels") as bar:
        for name, model, real in zip(names, flows, reals, strict=True):
            distributed.prepare_model(model.net, accelerator)
            model.net.eval().requires_grad_(False)
            for row, panel in zip(rows, solve_flow(args, accelerator, name, model, real, steps), strict=True):
                row.append(panel)
                bar.update()
    panels = [panel for row in rows for panel in row]
    start = "noise" if all(model.source.name == GAUSSIAN for model in flows) else "source"
    frames = []
    with distributed.progress(accelerator, args.frames, "frames") as bar:
        for t in uniform(args.frames - 1):
            frames.append(animation.figure_to_array(figure_at(panels, len(steps), t, start)))
            bar.update()
    names_written = animation.write(args.out / "compare.gif", frames)
    plots_2d.save(args.out / "compare.png", figure_at(panels, len(steps), None))
    text = markdown_table(panels, args.sampling_method)
    files.write_text(args.out / "compare.md", text + "\n")
    print(text)
    result = f"{' '.join([*names_written, 'compare.png', 'compare.md'])} in {args.out}"
    folder = files.free_folder(args.out / locate.name_of(args.weights[0]))
    animate = ["-m", "scripts.animate", "--weights", args.weights[0], "--out", folder]
    animate += args.typed("source", "seed")
    print(messages.summary(result, args.start, f"see one of them alone with: {commands.command(*animate, *args.overrides)}"))


def real_points(path: str, snap: snapshot.Snapshot, model: FlowModel) -> Tensor:
    """The points that the flow was trained on, [N, 2]. Raises UserError for a flow of anything else, or one with labels."""
    if not snap.space.is_points or model.net.num_classes is not None:
        raise UserError(f"--weights {path}: is not a flow of points without labels; to compare images use evaluate.py")
    snap.check_data()
    with error_context("data"):
        return DataSpec.of(snap.config.data).behind().build().images


def solve_flow(args, accelerator: Accelerator, name: str, model: FlowModel, real: Tensor, steps: list[int]) -> list[Panel]:
    """The flow with each of the numbers of steps."""
    panels = []
    indices = range(args.n_samples)
    for n in steps:
        settings = SamplerSettings(args.sampling_method, n, seed=args.seed)
        with args.naming_flags("compare"):
            validate(settings, model)
        adaptive = args.sampling_method in ADAPTIVE
        times = uniform(args.frames - 1) if adaptive else build_time_grid(settings, model.path)
        states, end = trajectory(accelerator, model, indices, settings, times, SHOWN)
        if not panels:
            deviation, _ = mean_straightness_deviation(accelerator, model, indices[:SHOWN], settings, STRAIGHTNESS_STEPS)
        distance = sliced_wasserstein(end.x.float().cpu(), real)
        trajectories = np.stack([x.float().cpu().numpy() for x in states])
        panels.append(Panel(name, None if adaptive else n, end.nfe, distance, deviation, times, trajectories))
    return panels


def figure_at(panels: list[Panel], rows: int, t: float | None, start: str = "noise") -> Figure:
    """The panels at time t (None: at the end, without a line of time), a row for each number of steps. start: at t = 0."""
    titles = [panel.name for panel in panels[: len(panels) // rows]] + [""] * (len(panels) - len(panels) // rows)
    captions = [f"NFE {p.nfe},  SW2 {p.distance:.3f}\nstraightness deviation {p.straightness_deviation:.2g}" for p in panels]
    figure, axes = plots_2d.panels(titles, captions, rows, t, start)
    for ax, panel in zip(axes, panels, strict=True):
        trajectories = panel.at(1.0 if t is None else t)
        plots_2d.particles(ax, trajectories[-1], trajectories[0])
        plots_2d.paths(ax, trajectories[:, :TRAJECTORIES])
    return figure


def markdown_table(panels: list[Panel], method: str) -> str:
    """The numbers under the panels as a table."""
    lines = [["flow", "method", "steps", "NFE", "SW2", "straightness deviation"]]
    for p in panels:
        steps = "" if p.steps is None else str(p.steps)
        lines.append([p.name, method, steps, str(p.nfe), f"{p.distance:.4f}", f"{p.straightness_deviation:.4f}"])
    return table.markdown(lines)


if __name__ == "__main__":
    cli_main(main)
