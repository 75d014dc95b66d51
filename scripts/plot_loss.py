"""Loss curves of one or several runs in one picture: `python -m scripts.plot_loss --runs runs/a runs/b --out loss.png`."""

from pathlib import Path

from configs.schema import UserError
from flow.engine import cli, runtime
from flow.engine.tracker import read_metrics
from flow.evaluation import plots

EXAMPLES = """\
  python -m scripts.plot_loss --runs runs/mnist_mini_cond --out loss.png
  python -m scripts.plot_loss --runs runs/mnist_rectify/1-rf runs/mnist_rectify/2-rf --against images --out loss.png"""


def parse_args():
    parser = cli.Parser(__doc__, EXAMPLES)
    parser.add_argument("--runs", nargs="+", type=Path, required=True, metavar="DIR", help="run folders")
    parser.add_argument("--against", choices=("step", "images"), default="step", help="horizontal axis (default: step)")
    parser.add_argument("--smooth", type=cli.at_least(1), default=1, help="mean over so many rows (default: 1, off)")
    parser.add_argument("--out", type=Path, required=True, metavar="PNG", help="picture to write")
    return parser.parse()


def main() -> None:
    args = parse_args()
    if args.out.suffix != ".png":
        raise UserError(f"--out {args.out}: must end in .png")
    curves = {}
    for run in args.runs:
        file = run / "metrics.jsonl"
        rows = read_metrics(file) if file.is_file() else []
        if not rows:
            raise UserError(f"--runs {run}: holds no row of metrics.jsonl; give the folder of a run that has logged")
        label = run.name if run.name not in curves else str(run)
        curves[label] = [row[args.against] for row in rows], [row["loss"] for row in rows]
    plots.loss_curves(args.out, curves, args.against, args.smooth)
    print(f"{len(curves)} curve(s) in {args.out}")


if __name__ == "__main__":
    runtime.run(main)
