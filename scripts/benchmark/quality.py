"""A fair race of training recipes: `python -m scripts.benchmark quality --configs A B --minutes 10 --seeds 3 --out DIR`.

Every recipe trains for the same minutes of the step on this machine: data, network and optimizer; checkpoints and evaluation
do not count. The seconds of a step come from a trial in which the recipes take turns. The number of steps that follows is
stored in race.json, so that a run stays a function of its seed. Schedules end with the last step. Then the
recipes are trained and evaluated in turn, one seed after the other. `--out` gets race.md, race.png (distance against
minutes), and a folder for each recipe with its runs and their rows. Run it again after a kill: finished work stays.

With `--images N` instead of `--minutes`, every recipe sees so many images, whatever a step costs. There is no trial, so
`--jobs K` may train K of the runs at the same time on one GPU; with train.cuda_graph two fill it.
"""

import hashlib
import json
import re
import shlex
import statistics
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from configs import loading
from configs.errors import UserError
from configs.schema import Config
from flow.evaluation import intervals, plots, results, runner, table
from flow.evaluation.checks import check_before_training
from flow.evaluation.entries import is_distance
from flow.evaluation.features import FEATURE_EXTRACTORS_REGISTRY
from flow.evaluation.metrics import METRICS
from flow.model import why_no_score
from flow.runtime import cli, commands, distributed, files, flags, lock, messages, step_names
from flow.runtime.commands import evaluate_arguments, train_arguments
from flow.runtime.errors import error_context
from flow.runtime.subprocesses import run_chains, run_command
from flow.sampling import exported, snapshot
from flow.solvers import ADAPTIVE, SOLVERS, STOCHASTIC
from flow.training.flow_task import FlowTask
from flow.training.optimizer import build_optimizer
from scripts.benchmark.trial import seconds_per_step, training_laps

EXAMPLES = """\
  python -m scripts.benchmark quality --configs configs/mnist.yaml "configs/mnist.yaml optimizer.lr=2e-3" \\
      --minutes 3 --seeds 3 --feature_extractor mnist --n_samples 2000 --out runs/race
  python -m scripts.benchmark quality --configs configs/mnist.yaml "configs/mnist.yaml optimizer.lr=2e-3" \\
      --images 100_000 --jobs 2 --feature_extractor mnist --out runs/race_images"""

MAX_NAME = 150  # characters


@dataclass
class Recipe:
    """A configuration with overrides, and the results of the trial."""

    name: str
    config: str
    overrides: list[str]
    content: str = ""  # a hash of all its values, as the YAML may change; of earlier versions: not known
    seconds_per_step: float = 0.0
    steps: int = 0


def parse_args(argv: list[str] | None = None):
    parser = cli.Parser(__doc__, EXAMPLES)
    parser.add_argument("--configs", nargs="+", required=True, metavar="RECIPE", help='a YAML, or "YAML key=value ..."')
    budget = parser.add_mutually_exclusive_group(required=True)
    budget.add_argument("--minutes", type=flags.positive, help="of training steps, for each run")
    budget.add_argument("--images", type=flags.at_least(1, most=10**18), help="that each run sees")
    flags.add_count_flag(parser, "--jobs", "runs at the same time, with --images", 1)
    flags.add_count_flag(parser, "--seeds", "runs of each recipe, seeds 0, 1, ...", 3)
    flags.add_count_flag(parser, "--curve", "points of the distance in training", 4)
    flags.add_count_flag(parser, "--trial_rounds", "turns of the trial", 3)
    flags.add_methods_flag(parser, SOLVERS, ["euler"])
    parser.add_argument(
        "--sampling_steps", nargs="+", type=flags.at_least(1), default=[20], help="of the solvers (default: 20)"
    )
    flags.add_guidance_flag(parser, several=True)
    flags.add_count_flag(parser, "--n_samples", "images a row", 5000, least=2)
    parser.add_argument("--feature_extractor", choices=FEATURE_EXTRACTORS_REGISTRY, default="mnist", help="(default: mnist)")
    parser.add_argument("--feature_layer", metavar="LAYER", help="(default: that of the Frechet distance)")
    parser.add_argument("--feature_weights", type=Path, metavar="PATH", help="local file, for machines without network")
    parser.add_argument("--reference", metavar="DIR|NPZ|NAME", help="real images (default: the training set)")
    parser.add_argument("--metrics", nargs="+", choices=METRICS, default=["fid", "prc", "accuracy"])
    flags.add_output_flag(parser)
    args = parser.parse(argv)
    if "fid" not in args.metrics:
        raise UserError(f"--metrics {' '.join(args.metrics)}: needs fid, by which recipes are compared")
    if args.jobs > 1 and args.minutes:
        raise UserError(f"--jobs {args.jobs}: runs beside each other take longer, so only with --images")
    return args


def main(argv: list[str]) -> None:
    args = parse_args(argv)
    recipes = read_recipes(args.configs, args.overrides)
    check_recipes(args, recipes)
    with lock.folder(args.out):
        recipes = fitted(args, recipes)
        if args.jobs > 1:
            runs = [(recipe, seed) for seed in range(args.seeds) for recipe in recipes]
            chains = {run_dir(args, *run).with_suffix(".log"): commands_of(args, *run) for run in runs}
            run_chains(chains, args.jobs, "runs")
            report(args, recipes, args.seeds)
        else:
            for seed in range(args.seeds):
                for recipe in recipes:
                    for arguments in commands_of(args, recipe, seed):
                        run_command(arguments)
                report(args, recipes, seed + 1)
        best = min(recipes, key=lambda recipe: final_distance(args, recipe))
    run = run_dir(args, best, 0)
    method, steps, scale = next(settings_of(args))
    words = ["--sampling_method", method, "--sampling_steps", str(steps), *commands.condition_flags(scale)]
    words += ["-mp", loading.load(best.config, best.overrides).train.mixed_precision]
    sample = commands.sample_command(run, best.name, *words, *exported.sample_flags(snapshot.load(run), None))
    print(messages.summary(f"race.md and race.png in {args.out}", args.start, f"sample with: {sample}"))


def read_recipes(words: list[str], overrides: list[str]) -> list[Recipe]:
    """The recipes of --configs, each with the overrides that all share.

    Raises UserError for one that is wrong or comes twice.
    """
    recipes = []
    for word in words:
        with error_context(f"--configs {word!r}"):
            config, *own = shlex.split(word) or [word]
            if not config.strip():
                raise ValueError('must be a YAML, or "YAML key=value ..."')
        content = loading.digest(loading.load(config, [*overrides, *own]))
        if key := next((key for key in ("seed", "train.steps") if key in loading.overridden([*overrides, *own])), None):
            raise UserError(f"--configs {word!r}: {key} is set by the race (--seeds, --minutes, --images)")
        recipe = Recipe(recipe_name(config, own), config, [*overrides, *own], content)
        if any(same_recipe(recipe, other) for other in recipes):
            raise UserError(f"--configs {word!r}: comes twice")
        names = [other.name for other in recipes]
        if recipe.name in names:  # of files of one name
            recipe.name = recipe_name(config, own, Path(config).absolute().parent.name)
        if recipe.name in names:
            raise UserError(f"--configs {word!r}: another recipe is called {recipe.name} too; copy the YAML to another name")
        recipes.append(recipe)
    return recipes


def recipe_name(config: str, own: list[str], folder: str = "") -> str:
    """What a recipe and its folder are called: after the YAML and the overrides of the recipe."""
    words = [Path(config).stem, *(re.sub(r"[^\w.=-]+", "_", override).strip("_") for override in own)]
    name = "_".join([*filter(None, [folder]), *words])
    if len(name) > MAX_NAME:
        name = f"{name[:MAX_NAME]}_{hashlib.sha256(name.encode()).hexdigest()[:8]}"
    return name


def same_recipe(one: Recipe, other: Recipe) -> bool:
    """Whether two recipes are of one file, with the same overrides."""
    return one.overrides == other.overrides and Path(one.config).resolve() == Path(other.config).resolve()


def check_recipes(args, recipes: list[Recipe]) -> None:
    """Build what train.py will build of each recipe, and load the feature extractor and the reference once, as evaluate.py will
    after the first training: a mistake in the last recipe would otherwise show after hours.

    Raises UserError for what either of the two would refuse.
    """
    settings = runner.EvaluationSettings(
        owner="benchmark quality", feature_extractor=args.feature_extractor, feature_layer=args.feature_layer,
        feature_weights=args.feature_weights, reference=args.reference, n_samples=args.n_samples, n_samples_key="--n_samples",
    )  # fmt: skip
    configs = [loading.load(recipe.config, recipe.overrides) for recipe in recipes]
    for recipe, config in zip(recipes, configs, strict=True):
        check_training(recipe.name, config)  # which counts the classes
        check_rows(args, recipe.name, config)
    for config in {str([config.data, config.flow.source]): config for config in configs}.values():
        check_before_training(config, settings)


def check_training(name: str, config: Config) -> None:
    """Raises UserError for data, a network, initial weights, a loss or an optimizer that train.py would refuse."""
    with distributed.cpu_accelerator() as accelerator:
        try:
            task = FlowTask(config, accelerator)
            task.load_init_weights()
            build_optimizer(task.net, config.optimizer, accelerator)
        except UserError as error:
            raise UserError(f"the recipe {name}: {error}") from None


def check_rows(args, name: str, config: Config) -> None:
    """Raises UserError for a solver or a guidance scale that a network of this training does not take."""
    noisy = next((method for method in args.methods if method in STOCHASTIC), None)
    if noisy and (reason := why_no_score(config.flow.source.name, config.flow.coupling)):
        raise UserError(f"--methods {noisy}: adds noise, which the recipe {name} does not allow ({reason}); use an ODE solver")
    has_conditions = config.model.args.get("num_classes") or config.model.args.get("max_prompt_bytes")
    if not has_conditions and (scale := next((w for w in args.guidance_scale if w != 1), None)):
        raise UserError(f"--guidance_scale {scale:g}: the recipe {name} trains without labels (model.args.num_classes)")


def fitted(args, recipes: list[Recipe]) -> list[Recipe]:
    """The recipes with their steps: those of race.json, else of a trial now or of --images, which are written there."""
    path = args.out / "race.json"
    stored: dict[str, Recipe] = {}
    if path.is_file():
        with error_context(f"{path}: is damaged; name another folder with --out"):
            record = files.read_json(path)
            if lacking := {"budget", "curve", "evaluation", "recipes"} - record.keys():
                raise ValueError(f"it has no {min(lacking)}")
            if not isinstance(record["evaluation"], dict):
                raise ValueError("evaluation holds something else")
            try:
                stored = {entry["name"]: Recipe(**entry) for entry in record["recipes"]}
            except (TypeError, KeyError):
                raise ValueError("recipes holds something else") from None
        if record["budget"] != budget(args):
            raise UserError(f"--out {args.out}: holds a race of {record['budget']}, not {budget(args)}; name another folder")
        if record["curve"] != args.curve:
            raise UserError(f"--curve {args.curve}: the runs in {args.out} have {record['curve']} points; name another folder")
        for flag, value in evaluation_flags(args).items():
            if (before := record["evaluation"].get(flag)) != value and has_rows(args.out):
                now, then = value or "left out", before or "its default"
                raise UserError(f"--{flag} {now}: the rows in {args.out} were measured with {then}; name another folder")
    for recipe in recipes:
        known = stored.get(recipe.name)
        if known and not same_recipe(known, recipe):
            raise UserError(f"--out {args.out}: holds a recipe {recipe.name} with other keys; name another folder")
        if known and known.content not in ("", recipe.content):
            raise UserError(f"--out {args.out}: has runs of {recipe.config} from before it changed; name another folder")
    new = [recipe for recipe in recipes if recipe.name not in stored]
    if args.minutes:
        for recipe, seconds in zip(new, trial(args, new), strict=True):
            recipe.seconds_per_step = seconds
            recipe.steps = max(1, round(60 * args.minutes / seconds))
    else:
        for recipe in new:
            recipe.steps = max(1, round(args.images / batch_size(recipe)))
    stored |= {recipe.name: recipe for recipe in new}
    known = [asdict(recipe) for recipe in stored.values()]
    record = {"budget": budget(args), "curve": args.curve, "evaluation": evaluation_flags(args), "recipes": known}
    files.write_text(path, json.dumps(record, indent=1))
    return [stored[recipe.name] for recipe in recipes]


def budget(args) -> str:
    """What a run may use, in words."""
    return f"{args.minutes:g} minutes of steps" if args.minutes else f"{args.images:,} images"


def evaluation_flags(args) -> dict[str, str | None]:
    """What all distances of a race are measured with, by flag."""
    names = ("feature_extractor", "feature_layer", "feature_weights", "reference")
    return {flag: None if getattr(args, flag) is None else str(getattr(args, flag)) for flag in names}


def has_rows(out: Path) -> bool:
    """Whether any run of the race has been measured."""
    return any(results.read(path.parent) for path in out.glob("*/seed_*/*/results.jsonl"))


def batch_size(recipe: Recipe) -> int:
    return loading.load(recipe.config, recipe.overrides).train.batch_size


def trial(args, recipes: list[Recipe]) -> list[float]:
    """Seconds of a step of each recipe; they take turns, so that a slow minute of the machine hits all."""
    rounds: list[list[list[float]]] = [[] for _ in recipes]
    with tempfile.TemporaryDirectory() as scratch:
        for turn in range(args.trial_rounds):
            for recipe, own in zip(recipes, rounds, strict=True):
                print(f"trial {turn + 1} of {args.trial_rounds}: {recipe.name}", flush=True)
                own.append(training_laps(recipe.config, recipe.overrides, Path(scratch)))
    return [seconds_per_step(own) for own in rounds]


def run_dir(args, recipe: Recipe, seed: int) -> Path:
    return args.out / recipe.name / f"seed_{seed}"


def snapshot_steps(args, recipe: Recipe) -> list[int]:
    """The steps whose snapshots the curve shows: those of its checkpoints, and the last one."""
    every = checkpoint_every(args, recipe)
    return [*(every * k for k in range(1, args.curve) if every * k < recipe.steps), recipe.steps]


def checkpoint_every(args, recipe: Recipe) -> int:
    return max(1, recipe.steps // args.curve)


def commands_of(args, recipe: Recipe, seed: int) -> Iterator[list[str]]:
    """The commands of a run, each known when those before it have ended: its training, the rows of its last weights, and a row
    of each snapshot on the way, at the first of the settings."""
    run = run_dir(args, recipe, seed)
    overrides = [
        *recipe.overrides, f"seed={seed}", f"train.steps={recipe.steps}", "train.sample_every_steps=0", "train.log_with=[]",
        f"train.checkpoint_every_steps={checkpoint_every(args, recipe)}", "train.keep_snapshots=0",
        "evaluate.every_steps=0", "evaluate.loss_every_steps=0", "evaluate.keep_best=null",
    ]  # fmt: skip
    yield train_arguments(recipe.config, run, overrides)
    precision = loading.load(recipe.config, recipe.overrides).train.mixed_precision
    shared = {"n_samples": args.n_samples, "bspp": 250, "mixed_precision": precision}
    shared |= {flag: value for flag, value in evaluation_flags(args).items() if value}
    yield evaluate_arguments(
        run, run / "evaluation", methods=args.methods, sampling_steps=args.sampling_steps, guidance_scale=args.guidance_scale,
        metrics=args.metrics, **shared,
    )  # fmt: skip
    method, steps, scale = args.methods[0], args.sampling_steps[0], args.guidance_scale[0]
    for step in snapshot_steps(args, recipe)[:-1]:
        weights = run / "snapshots" / step_names.name_of(step, ".safetensors")
        yield evaluate_arguments(
            weights, run / "curve", methods=method, sampling_steps=steps, guidance_scale=scale, metrics="fid", no_control=True,
            **shared,
        )  # fmt: skip


def rows_of(args, recipe: Recipe, seed: int, folder: str = "evaluation") -> list[dict]:
    """Rows of the table of a run, with as many images as this race asks for."""
    return results.rows_of(run_dir(args, recipe, seed) / folder, args.n_samples)


def report(args, recipes: list[Recipe], seeds: int) -> None:
    """Write and print race.md and draw race.png for the seeds that are finished."""
    cells: dict[tuple, list[dict]] = {}  # the rows of the seeds
    for setting in settings_of(args):
        for recipe in recipes:
            cells[*setting, recipe.name] = [pick(rows_of(args, recipe, seed), *setting) for seed in range(seeds)]
    names = list(dict.fromkeys(name for rows in cells.values() for row in rows for name in row["metrics"]))
    distance = next(filter(is_distance, names))
    names.remove(distance)
    digits = table.decimals(distance)
    speed = ["images/s"] if args.minutes else []
    lines = [["recipe", "steps", *speed, "solver", "NFE", "guidance", distance, "change", *names]]
    for method, steps, scale in settings_of(args):
        base = [row["metrics"][distance] for row in cells[method, steps, scale, recipes[0].name]]
        for recipe in recipes:
            rows = cells[method, steps, scale, recipe.name]
            values = [row["metrics"][distance] for row in rows]
            others = [mean_of([row["metrics"].get(name) for row in rows], 3) for name in names]
            rate = [f"{batch_size(recipe) / recipe.seconds_per_step:.0f}"] if args.minutes else []
            errors = [row.get("standard_errors", {}).get(distance) for row in rows]
            change = "" if recipe is recipes[0] else difference(values, base, digits)
            lines.append([
                recipe.name, str(recipe.steps), *rate, method, f"{statistics.fmean(row['NFE'] for row in rows):g}",
                f"{scale:g}", spread(values, errors, digits), change, *others,
            ])  # fmt: skip
    floors = results.real_rows(run_dir(args, recipes[0], 0) / "evaluation", args.n_samples)
    text = table.markdown(lines)
    note = [f"{budget(args)} a run, {seeds} seed(s), {args.n_samples:,} images a row."]
    if seeds == 1:
        note += [f"{distance} ± its 95% interval over samples. Change: to the first recipe."]
    else:
        note += [
            f"{distance}: mean over the seeds ± its 95% interval over samples, then the smallest and the largest seed. Change: "
            "to the first recipe, the mean over seeds ± its standard error."
        ]
    note += [
        f"{row['weights']}, n = {row['n']:,}: {distance} {row['metrics'][distance]:.{table.decimals(distance)}f}."
        for row in floors
    ]
    files.write_text(args.out / "race.md", f"{text}\n\n{' '.join(note)}\n")
    curves = {recipe.name: curve(args, recipe, seeds, distance) for recipe in recipes}
    axis = "minutes of training steps" if args.minutes else "thousand training images"
    plots.distance_in_training(args.out / "race.png", curves, axis, distance, [row["metrics"][distance] for row in floors])
    print(f"\n{text}\n\n{' '.join(note)}", flush=True)


def settings_of(args) -> Iterator[tuple[str, int, float]]:
    """(method, steps, guidance scale) of the rows of a run."""
    for scale in args.guidance_scale:
        for method in args.methods:
            for steps in args.sampling_steps[:1] if method in ADAPTIVE else args.sampling_steps:
                yield method, steps, scale


def pick(rows: list[dict], method: str, steps: int, scale: float) -> dict:
    """The row of these settings."""
    return next(row for row in rows if has_settings(row, method, steps, scale))


def has_settings(row: dict, method: str, steps: int, scale: float) -> bool:
    """Whether a row is of these settings; a network without labels has no guidance scale, an adaptive solver no steps."""
    return row.get("method") == method and row["steps"] in (steps, None) and row["guidance_scale"] in (scale, None)


def final_distance(args, recipe: Recipe) -> float:
    """The mean distance over the seeds at the first of the settings."""
    rows = [pick(rows_of(args, recipe, seed), *next(settings_of(args))) for seed in range(args.seeds)]
    return statistics.fmean(next(v for name, v in row["metrics"].items() if is_distance(name)) for row in rows)


def curve(args, recipe: Recipe, seeds: int, distance: str) -> list[tuple[float, list[float]]]:
    """(minutes or thousand images, distance of each seed) for the snapshots of the runs."""
    first = next(settings_of(args))
    points: dict[int, list[float]] = {}
    for seed in range(seeds):
        for row in rows_of(args, recipe, seed, "curve"):
            if has_settings(row, *first):
                step = int(row["weights"].rpartition("@")[2])
                points.setdefault(step, []).append(row["metrics"][distance])
        final = pick(rows_of(args, recipe, seed), *first)
        points.setdefault(recipe.steps, []).append(final["metrics"][distance])
    cost = recipe.seconds_per_step / 60 if args.minutes else batch_size(recipe) / 1_000
    return [(step * cost, values) for step, values in sorted(points.items())]


def spread(values: list[float], errors: list[float | None], digits: int) -> str:
    """'2.31 ± 0.08 (2.25 to 2.40)' for the distances of the seeds and their standard errors."""
    text = f"{statistics.fmean(values):.{digits}f}"
    known = [error for error in errors if error is not None]
    if len(known) == len(values):
        text += f" ± {intervals.NORMAL_95 * sum(error**2 for error in known) ** 0.5 / len(known):.{digits}f}"
    return text + (f" ({min(values):.{digits}f} to {max(values):.{digits}f})" if len(values) > 1 else "")


def difference(values: list[float], base: list[float], digits: int) -> str:
    """The mean over seeds of what a recipe changes, with its standard error."""
    changes = [a - b for a, b in zip(values, base, strict=True)]
    error = f" ± {statistics.stdev(changes) / len(changes) ** 0.5:.{digits}f}" if len(changes) > 1 else ""
    return f"{statistics.fmean(changes):+.{digits}f}{error}"


def mean_of(values: list[float | None], digits: int) -> str:
    known = [value for value in values if value is not None]
    return f"{statistics.fmean(known):.{digits}f}" if known else ""
