"""Loss curves of one or several runs in one picture: `python -m scripts.plot_loss --runs runs/a runs/b --out loss.png`.

Runs that minimize different losses get a panel for each loss. The validation loss, of runs that have logged it, is a dashed
line: in the panel of the training loss where both measure the same, else in a panel of its own.
"""

import inspect
import sys
from pathlib import Path

from omegaconf import OmegaConf

from configs import loading
from configs.errors import UserError
from configs.schema import LossConfig
from configs.vae import VaeConfig
from flow import losses
from flow.evaluation import plots
from flow.runtime import cli, commands, flags, jsonl, messages
from flow.runtime.errors import cli_main
from flow.sampling.locate import names_of
from flow.training.logging import read_metrics

EXAMPLES = """\
  python -m scripts.plot_loss --runs runs/mnist_mini_cond --out loss.png
  python -m scripts.plot_loss --runs runs/mnist_rectify/1-rf runs/mnist_rectify/2-rf --against images --out loss.png"""

VALIDATION = ", held-out data, averaged weights"


def parse_args():
    parser = cli.Parser(__doc__, EXAMPLES)
    parser.add_argument("--runs", nargs="+", type=Path, required=True, metavar="DIR", help="run folders")
    parser.add_argument("--against", choices=("step", "images"), default="step", help="horizontal axis (default: step)")
    flags.add_count_flag(parser, "--smooth", "mean over N rows", 1)
    flags.add_output_flag(parser, use="picture to write", metavar="PNG")
    return parser.parse(takes_keys=False)


def main() -> None:
    args = parse_args()
    if args.out.suffix != ".png":
        raise UserError(f"--out {args.out}: must end in .png")
    curves: dict[str, dict[str, tuple[list[float], list[float]]]] = {}  # by loss and run
    runs = list(dict.fromkeys(args.runs))
    labels = names_of(runs)
    for run, label in zip(runs, labels, strict=True):
        file = run / "metrics.jsonl"
        rows = read_metrics(file) if file.is_file() else []
        validation = curve(rows, args.against, "validation_loss")
        rows = [row for row in rows if "loss" in row or "images" not in row]  # without those of evaluations
        x, values = curve(rows, args.against, "loss")
        if not x:
            raise UserError(f"--runs {run}: holds no row of metrics.jsonl; give the folder of a run that has logged")
        if len(x) < len(rows):
            print(f"{file}: {len(rows) - len(x)} of {len(rows)} rows have no loss or no {args.against}")
        training_name, validation_name = loss_names(run / "config.yaml")
        curves.setdefault(training_name, {})[label] = x, values
        if validation[0]:
            curves.setdefault(validation_name, {})[f"{label}{VALIDATION}"] = validation
    dashed = {f"{label}{VALIDATION}" for label in labels}
    plots.loss_curves(args.out, curves, args.against, args.smooth, dashed)
    smoother = commands.command("-m", "scripts.plot_loss", *sys.argv[1:], "--smooth", str(10 * args.smooth))
    print(messages.summary(f"{len(labels)} run(s) in {args.out}", args.start, f"smooth them with: {smoother}"))


def curve(rows: list[dict], against: str, key: str) -> tuple[list[float], list[float]]:
    """The two columns of the rows that have both as numbers."""
    points = [(row[against], row[key]) for row in rows if has_numbers(row, against, key)]
    return [x for x, _ in points], [value for _, value in points]


def has_numbers(row: dict, *keys: str) -> bool:
    return all(jsonl.is_number(row.get(key)) for key in keys)


def loss_names(config: Path) -> tuple[str, str]:
    """What a run minimizes and what its validation loss is, from its config.yaml; of one that does not exist or is damaged just
    "training loss" and "validation loss"."""
    try:
        text = config.read_text(encoding="utf-8")
        if "autoencoder" in OmegaConf.create(text):
            cfg = loading.parse(text, str(config), kind=VaeConfig).autoencoder
            lpips = f" + {cfg.lpips_weight:g} LPIPS" if cfg.lpips_weight else ""
            return f"autoencoder loss ({cfg.distance} + {cfg.kl_weight:g} KL{lpips})", "validation loss"
        parsed = loading.parse(text, str(config))
        loss, flow = parsed.loss, parsed.flow
        distance = loss.args.get("distance", "mse")
        weighted = "weighted " if is_weighted(loss) else ""
        name = f"{loss.name.replace('_', ' ')} loss ({weighted}{distance} of the {flow.prediction})"
        requested = (loss.name, distance, weighted, flow.time_sampler, flow.coupling)
        same = requested == ("flow_matching", "mse", "", "uniform", "independent")
        return name, name if same else f"validation loss (mse of the {flow.prediction})"
    except Exception:  # OmegaConf and YAML have many; the curve is worth more than its title
        return "training loss", "validation loss"


def is_weighted(loss: LossConfig) -> bool:
    """Whether the loss of a sample is weighted by its size."""
    power = inspect.signature(losses.LOSSES[loss.name]).parameters.get("weight_power")
    return bool(loss.args.get("weight_power", power.default if power else 0))


if __name__ == "__main__":
    cli_main(main)
