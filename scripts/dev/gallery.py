"""Every picture of docs/gallery.md, from nothing: `python -m scripts.dev.gallery` trains the flows and draws them.

Each step is a command that a user would type, and is printed. Run it again after a kill: what is finished stays, a run
resumes, and figures that are older than their weights are drawn again. Overrides reach every training.
"""

from dataclasses import dataclass
from pathlib import Path

from flow.runtime import cli, commands, messages
from flow.runtime.commands import train_arguments
from flow.runtime.errors import cli_main
from flow.runtime.subprocesses import run_command
from flow.sampling import locate

EXAMPLES = """\
  make gallery
  python -m scripts.dev.gallery --only moons reflow --out figures"""


# name -> overrides of configs/toy.yaml; the mixture, whose density is smooth, has a configuration of its own
SETS: dict[str, tuple[str, ...]] = {
    "checkerboard": (),
    "moons": ("data.args.name=moons", "train.steps=4_000"),
    "eight_gaussians": ("data.args.name=eight_gaussians", "train.steps=4_000"),
    "mixture": (),
    "spirals": ("data.args.name=spirals", "train.steps=4_000"),
    "rings": ("data.args.name=rings", "train.steps=4_000"),
    "pinwheel": ("data.args.name=pinwheel", "train.steps=4_000"),
    "image": ("data.args={name: image, path: docs/images/cat.png}", "train.steps=6_000"),
}


WITH_LIKELIHOOD = ("checkerboard", "mixture")
OT = ("flow.coupling=ot", "flow.coupling_args={block: 256}")


@dataclass(frozen=True)
class Exhibit:
    """A folder of figures, the runs that they need, and the command that draws them."""

    name: str
    figures: tuple[str, ...]
    draw: tuple[str, ...]
    weights: tuple[str, ...]  # names of runs
    config: str  # of the run `name`
    overrides: tuple[str, ...] = ()


def exhibits(runs: Path) -> list[Exhibit]:
    """In order: the later ones use runs of the earlier."""
    compare = ("-m", "scripts.compare", "--sampling_steps", "2", "100")
    result = []
    for name, overrides in SETS.items():
        kinds = ("flow", "density", "likelihood") if name in WITH_LIKELIHOOD else ("flow", "density")
        figures = tuple("flow.gif" if kind == "flow" else f"{kind}.png" for kind in kinds)
        draw = ("-m", "scripts.animate", "--figures", *kinds)
        result.append(Exhibit(name, figures, draw, (name,), toy_config(name), overrides))
    from_flow = (f"data.args.path={runs / 'pairs'}", f"train.init_from={runs / 'checkerboard'}")
    result.append(
        Exhibit(
            "reflow", ("compare.gif", "compare.png"), (*compare, "--names", "flow", "reflow"), ("checkerboard", "reflow"),
            "configs/toy_reflow.yaml", from_flow,
        )
    )  # fmt: skip
    result.append(
        Exhibit(
            "coupling", ("compare.gif", "compare.png"), (*compare, "--names", "independent", "optimal transport"),
            ("eight_gaussians", "coupling"), "configs/toy.yaml", (*SETS["eight_gaussians"], *OT),
        )
    )  # fmt: skip
    jumps = ("-m", "scripts.compare", "--sampling_steps", "1", "2", "4", "--names", "flow map")
    result.append(Exhibit("flow_map", ("compare.gif", "compare.png"), jumps, ("flow_map",), "configs/toy_flow_map.yaml"))
    result.append(Exhibit("digits", ("trajectory.gif",), ("-m", "scripts.animate"), ("digits",), "configs/digits.yaml"))
    return result


def toy_config(name: str) -> str:
    return "configs/toy_mixture.yaml" if name == "mixture" else "configs/toy.yaml"


def parse_args():
    parser = cli.Parser(__doc__, EXAMPLES)
    names = [exhibit.name for exhibit in exhibits(Path())]
    parser.add_argument("--only", nargs="+", choices=names, default=names, help="and what they need (default: all)")
    parser.add_argument("--runs", type=Path, default=Path("runs/gallery"), metavar="DIR", help="(default: runs/gallery)")
    parser.add_argument(
        "--out", type=Path, default=Path("docs/images/gallery"), metavar="DIR", help="(default: docs/images/gallery)"
    )
    return parser.parse()


def main() -> None:
    args = parse_args()
    plan = {exhibit.name: exhibit for exhibit in exhibits(args.runs)}
    trained: set[str] = set()
    for name in args.only:
        exhibit = plan[name]
        for run in [*exhibit.weights, name]:
            if run not in trained:
                train(plan[run], args.runs, args.overrides)
                trained.add(run)
        weights = [args.runs / run for run in exhibit.weights]
        if outdated([args.out / name / picture for picture in exhibit.figures], weights):
            run_command([*exhibit.draw, "--weights", *map(str, weights), "--out", str(args.out / name)])
    sample = commands.sample_command(args.runs / args.only[0], args.only[0])
    print(messages.summary(f"\nfigures in {args.out}", args.start, f"sample from a flow with: {sample}"))


def train(exhibit: Exhibit, runs: Path, overrides: list[str]) -> None:
    """The run of an exhibit; that of reflow needs pairs of the flow that it straightens."""
    if exhibit.name == "reflow":
        pairs = ["--n_pairs", "50000", "--shard_pairs", "10000", "--bspp", "5000", "--sampling_steps", "50"]
        run_command(
            ["-m", "scripts.make_pairs", "--weights", str(runs / "checkerboard"), "--save_dir", str(runs / "pairs"), *pairs]
        )
    run_command(train_arguments(exhibit.config, runs / exhibit.name, [*exhibit.overrides, *overrides]))


def outdated(figures: list[Path], weights: list[Path]) -> bool:
    """Whether a picture is missing, or older than the latest snapshot of a run."""
    latest = max(locate.find(run).stat().st_mtime for run in weights)
    return not all(picture.is_file() and picture.stat().st_mtime > latest for picture in figures)


if __name__ == "__main__":
    cli_main(main)
