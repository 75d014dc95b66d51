"""Routes to few steps, compared: trainings, pairs, table and figure by one command: `python -m scripts.rectify -c YAML`.

A route is a chain of stages: trainings (flow, reflow, distillation, flow map) and pairs of the network before. With `minutes`
every route takes as long as the others, its teachers and pairs included: the seconds of a step or a pair come from a trial
just before the stage, and what follows from them is stored in plan.json. Each stage is a command that a user would type, and
is printed. Run it again after a kill: it resumes and ends with the same files. Below `folder`: a folder for each stage,
evaluation/ (every cell of the table), comparison.md and comparison.png.
"""

import json
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import count
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator

import datasets
from configs import loading, schema
from configs.errors import UserError
from configs.rectify import PairsConfig, RectifyConfig, RouteConfig
from configs.schema import Config
from datasets.pairs import read_manifest
from flow import losses, solvers, time_samplers
from flow import path as paths
from flow.evaluation import pictures, table
from flow.evaluation.features import FEATURE_EXTRACTORS_REGISTRY
from flow.evaluation.straightness import mean_straightness_deviation
from flow.guidance import network_calls
from flow.likelihood import T_MAX
from flow.losses import FlowLoss
from flow.model import FlowModel, why_no_score
from flow.runtime import cli, commands, distributed, files, lock
from flow.runtime.commands import evaluate_arguments, train_arguments
from flow.runtime.errors import cli_main, error_context
from flow.runtime.subprocesses import run_command
from flow.sampling import images, snapshot
from flow.sampling.generate import generate
from flow.sampling.settings import SamplerSettings
from flow.sampling.space import Space
from flow.training.logging import read_metrics
from scripts.benchmark.trial import sampling_seconds, seconds_per_step, training_laps

EXAMPLES = """\
  python -m scripts.rectify -c configs/mnist_rectify.yaml
  python -m scripts.rectify -c configs/digits_few_steps.yaml minutes=2 folder=runs/digits_two_minutes
  python -m scripts.rectify -c configs/mnist_rectify.yaml --launcher "accelerate-launch --multi_gpu --num_processes 8\""""
SHOWN_NFE = (1, 2)  # columns of the figure, and the largest of the table
COLUMNS = 8  # images of a class in a panel of the figure
TRIAL_ROUNDS = 3


@dataclass
class Cost:
    """What a stage took."""

    images: int = 0  # trained on, or made
    minutes: float = 0.0
    passes: float = 0.0  # of an image through the network, a backward pass counts as two

    def __add__(self, other: "Cost") -> "Cost":
        return Cost(self.images + other.images, self.minutes + other.minutes, self.passes + other.passes)


@dataclass
class Row:
    """A row of the table."""

    title: str
    route: RouteConfig
    scale: float
    method: str

    @property
    def network(self) -> str:
        return self.route.stages[-1]


def parse_args():
    parser = cli.Parser(__doc__, EXAMPLES, kind=RectifyConfig, keys="configs/rectify.py")
    cli.add_config_flag(parser, "e.g. configs/mnist_rectify.yaml", required=True)
    parser.add_argument("--launcher", metavar="COMMAND", help="what starts each script (default: this Python)")
    return parser.parse()


def main() -> None:
    args = parse_args()
    cfg = loading.load(args.config, args.overrides, kind=RectifyConfig)
    if args.launcher and cfg.minutes is not None:
        raise UserError(f"--launcher: minutes={cfg.minutes:g} is measured with one process; set minutes=null and train.steps")
    check_routes(cfg)
    with lock.folder(Path(cfg.folder)):
        Rectify(cfg, args.launcher, args.start).run()


class Rectify:
    """The stages in their order, then the comparison."""

    def __init__(self, cfg: RectifyConfig, launcher: str | None, start: float):
        self.cfg, self.launcher, self.start, self.folder = cfg, launcher, start, Path(cfg.folder)
        self.plan_file = self.folder / "plan.json"
        self.rows = table_rows(cfg)

    def run(self) -> None:
        stages = {name: (route, k) for route in self.cfg.routes.values() for k, name in enumerate(route.stages)}
        self.plans()  # a damaged plan is named before hours of training
        self.count, self.done = len(stages) + len(self.rows) + 1, 0
        for name, (route, k) in stages.items():
            self.announce(f"{'training' if self.cfg.stages[name].config else 'pairs'}: {name}")
            self.run_stage(name, *self.cfg.before(route, k))
        for row in self.rows:
            self.announce(f"evaluation of {row.title}")
            run_command(self.evaluation(row), self.launcher)
        self.announce("comparison")
        best = compare(self.cfg, self.folder, self.rows, {row.network: self.route_cost(row.route) for row in self.rows})
        result = f"comparison.md and comparison.png in {self.folder}"
        steps = min(self.cfg.nfe)
        flags = ["--sampling_method", best.method, "--sampling_steps", str(steps), *commands.condition_flags(best.scale)]
        sample = commands.sample_command(self.folder / best.network, f"{self.folder.name}_{best.network}", *flags)
        print(cli.summary(result, self.start, f"{best.title} is best at NFE {steps}; sample with: {sample}"))

    def announce(self, title: str) -> None:
        self.done += 1
        print(f"\nstage {self.done} of {self.count}: {title} ({elapsed(self.start)} so far)", flush=True)

    def run_stage(self, name: str, teacher: str | None, pairs: str | None) -> None:
        """The command of a stage. The seconds of pairs add up in plan.json over the calls that make some of them."""
        stage = self.cfg.stages[name]
        arguments = self.training(name, teacher, pairs) if stage.config else self.pairs(name, teacher)
        before, start = self.shards(name), time.perf_counter()
        try:
            run_command(arguments, self.launcher)
        finally:
            if stage.pairs is not None and self.shards(name) > before:
                self.record(name, elapsed=self.plan(name).get("elapsed", 0.0) + time.perf_counter() - start)

    def shards(self, name: str) -> int:
        """Whole files of pairs that a stage has written."""
        return sum(not path.name.startswith(files.TEMPORARY) for path in (self.folder / name).glob("*.safetensors"))

    def training(self, name: str, teacher: str | None, pairs: str | None) -> list[str]:
        stage = self.cfg.stages[name]
        assert stage.config is not None
        overrides = [*stage.overrides]
        if teacher and "train.init_from" not in loading.overridden(overrides):
            overrides.append(f"train.init_from={self.folder / teacher}")
        if loading.load(stage.config, overrides).data.name == "pairs":
            overrides.append(f"data.args.path={self.folder / str(pairs)}")

        def seconds(scratch: Path) -> float:
            return seconds_per_step([training_laps(str(stage.config), overrides, scratch) for _ in range(TRIAL_ROUNDS)])

        if (steps := self.fitted(name, seconds)) is not None:
            overrides.append(f"train.steps={steps}")
        return train_arguments(stage.config, self.folder / name, overrides)

    def pairs(self, name: str, teacher: str | None) -> list[str]:
        """Of make_pairs; each set has noise of its own."""
        stage = self.cfg.stages[name]
        assert stage.pairs is not None and teacher is not None
        settings, source = stage.pairs, self.cfg.stages[teacher]

        def seconds(scratch: Path) -> float:
            passes = pair_passes(settings, 1 - settings.real_fraction, settings.real_fraction)
            return sampling_seconds(str(self.folder / teacher / "config.yaml"), [], scratch) * passes

        n_pairs = self.fitted(name, seconds) or settings.n_pairs
        states = ["--keep_states", str(settings.keep_states)] if settings.keep_states else []
        if "seed" not in self.plan(name):  # stored, as stages may be added later
            taken = {plan.get("seed") for plan in self.plans().values()}
            self.record(name, seed=next(seed for seed in count(1) if seed not in taken))
        return [
            "-m", "scripts.make_pairs", "--weights", str(self.folder / teacher), "--save_dir", str(self.folder / name),
            "--n_pairs", str(n_pairs), "--seed", str(self.plan(name)["seed"]), "--sampling_method", settings.sampling_method,
            "--sampling_steps", str(settings.sampling_steps), "--guidance_scale", str(settings.guidance_scale),
            "--real_fraction", str(settings.real_fraction), *states,
            "-mp", loading.load(source.config, source.overrides).train.mixed_precision,
        ]  # fmt: skip

    def fitted(self, name: str, trial: Callable[[Path], float]) -> int | None:
        """The steps or pairs that fill the share of the minutes, stored at the first call; None where there is no budget.

        trial: seconds of a step or pair, measured with a scratch folder. Raises UserError for the plan of another budget.
        """
        if self.cfg.minutes is None:
            return None
        plan, budget = self.plan(name), {"minutes": self.cfg.minutes, "share": self.cfg.stages[name].share}
        if "count" not in plan:
            with tempfile.TemporaryDirectory() as scratch:
                seconds = trial(Path(scratch))
            fitting = max(1, round(60 * budget["minutes"] * budget["share"] / seconds))
            self.record(name, **budget, seconds=seconds, count=fitting)
            return fitting
        if budget != {key: plan[key] for key in budget}:
            raise UserError(f"minutes={self.cfg.minutes:g}: {self.plan_file} is of another budget; name another folder")
        return plan["count"]

    def plan(self, name: str) -> dict:
        return self.plans().get(name, {})

    def plans(self) -> dict[str, dict]:
        """plan.json: by stage what was fitted or measured."""
        if not self.plan_file.is_file():
            return {}
        with error_context(f"{self.plan_file}: is damaged; name another folder"):
            return files.read_json(self.plan_file)

    def record(self, name: str, **entries: float) -> None:
        plans = self.plans()
        plans[name] = {**plans.get(name, {}), **entries}
        files.write_text(self.plan_file, json.dumps(plans, indent=1))

    def evaluation(self, row: Row) -> list[str]:
        return evaluate_arguments(
            self.folder / row.network, self.folder / "evaluation", guidance_scale=row.scale, methods=row.method,
            sampling_steps=self.cfg.nfe, n_samples=self.cfg.n_samples, metrics=["fid", "accuracy"],
            feature_extractor=self.cfg.feature_extractor, mixed_precision=first_config(self.cfg).train.mixed_precision,
        )  # fmt: skip

    def route_cost(self, route: RouteConfig) -> Cost:
        return sum((self.stage_cost(name) for name in route.stages), Cost())

    def stage_cost(self, name: str) -> Cost:
        """Of a finished stage: the minutes of its steps without checkpoints and previews, or of making its pairs."""
        stage = self.cfg.stages[name]
        if stage.pairs is not None:
            manifest = read_manifest(self.folder / name)
            generated, inverted = manifest["generated"], manifest["inverted"]
            passes = pair_passes(stage.pairs, generated, inverted)
            return Cost(generated + inverted, self.plan(name).get("elapsed", 0.0) / 60, passes)
        assert stage.config is not None
        rows = [row for row in read_metrics(self.folder / name / "metrics.jsonl") if "images_per_second" in row]
        seen = [0, *(row["images"] for row in rows)]
        seconds = sum((now - last) / row["images_per_second"] for last, now, row in zip(seen, seen[1:], rows, strict=False))
        config = loading.load(stage.config, stage.overrides)
        return Cost(seen[-1], seconds / 60, seen[-1] * build_loss(config).passes)


def elapsed(start: float) -> str:
    return cli.duration(time.perf_counter() - start)


def table_rows(cfg: RectifyConfig) -> list[Row]:
    rows = []
    for name, route in cfg.routes.items():
        for scale in route.guidance_scale:
            for method in route.methods:
                guided = f", w = {scale:g}" if scale != 1 else ""
                by = f", {method}" if len(route.methods) > 1 and method != "euler" else ""
                rows.append(Row(name + guided + by, route, scale, method))
    return rows


def first_config(cfg: RectifyConfig) -> Config:
    """The configuration of the first training of all."""
    stage = cfg.stages[next(iter(cfg.routes.values())).stages[0]]
    return loading.load(stage.config, stage.overrides)


def pair_passes(settings: PairsConfig, generated: float, inverted: float = 0) -> float:
    """Network passes of so many generated pairs, and of pairs of real images, whose noise comes from the flow solved backwards
    without guidance."""
    method, steps = settings.sampling_method, settings.sampling_steps
    calls = network_calls(settings.guidance_scale)
    return generated * calls * solvers.nfe(method, steps) + inverted * solvers.nfe(method, steps, T_MAX)


def build_loss(config: Config) -> FlowLoss:
    time_sampler = time_samplers.build(config.flow.time_sampler, **config.flow.time_sampler_args)
    return losses.build(config.loss.name, paths.build(config.flow.path), config.flow.prediction, time_sampler, config.loss.args)


def check_routes(cfg: RectifyConfig) -> None:
    """Raises UserError for what would otherwise fail after hours, in the middle of a route."""
    configs = {name: loading.load(stage.config, stage.overrides) for name, stage in cfg.stages.items() if stage.config}
    for name, config in configs.items():
        with error_context(f"{cfg.stages[name].config}: loss"):
            build_loss(config)
        shape = datasets.expected_shape(config.data.name, config.data.args)
        if shape and Space(shape).is_points:
            key = f"{cfg.stages[name].config}: data.name={config.data.name}"
            raise UserError(f"{key}: routes are for images; flows of points are compared by scripts.compare")
    resolve_classes(cfg, configs)
    for name, route in cfg.routes.items():
        for k, stage in enumerate(route.stages):
            check_stage(cfg, configs, f"routes.{name}: {stage}", stage, *cfg.before(route, k))
        for method in route.methods:
            with error_context(f"routes.{name}.methods"):
                check_method(cfg, configs[route.stages[-1]], method)
        if set(route.guidance_scale) != {1} and not classes_of(configs[route.stages[-1]]):
            raise UserError(f"routes.{name}.guidance_scale={route.guidance_scale}: needs labels (model.args.num_classes)")
    if cfg.feature_extractor not in FEATURE_EXTRACTORS_REGISTRY:
        known = ", ".join(FEATURE_EXTRACTORS_REGISTRY)
        raise UserError(f"feature_extractor={cfg.feature_extractor}: unknown; choose one of {known}")


def resolve_classes(cfg: RectifyConfig, configs: dict[str, Config]) -> None:
    """Replace num_classes=auto by the number that each training of the routes will find in its data; pairs have the classes of
    the network that made them."""
    for route in cfg.routes.values():
        for k, name in enumerate(route.stages):
            config = configs.get(name)
            if config is None or not schema.wants_auto_classes(config):
                continue
            pairs = cfg.before(route, k)[1]
            if config.data.name != "pairs":
                with error_context(f"{cfg.stages[name].config}: data"):
                    data = datasets.build(config.data.name, config.data.root, config.data.args)
                schema.set_auto_classes(config, data.class_names if data.labels is not None else ())
            elif pairs:
                maker = cfg.before(route, route.stages.index(pairs))[0]
                config.model.args["num_classes"] = classes_of(configs[str(maker)])


def classes_of(config: Config) -> int | None:
    """Of the network's labels, once `resolve_classes` has counted them; None for a network without labels."""
    return config.model.args.get("num_classes")


def check_method(cfg: RectifyConfig, config: Config, method: str) -> None:
    """Raises ValueError for a solver that a network of this training does not go with, or whose steps are not its NFE."""
    solvers.check(method)
    reason = why_no_score(config.flow.source.name, config.flow.coupling)
    if method in solvers.STOCHASTIC and reason:
        raise ValueError(f"{method!r} needs the score ({reason}); use euler")
    if method in solvers.HAS_TOLERANCES or any(solvers.nfe(method, n) != n for n in cfg.nfe):
        raise ValueError(f"{method!r} does not take one evaluation a step, and the columns of the table are NFE; use euler")


def check_stage(
    cfg: RectifyConfig, configs: dict[str, Config], key: str, name: str, teacher: str | None, pairs: str | None
) -> None:
    stage = cfg.stages[name]
    if stage.pairs is not None:
        assert teacher is not None  # routes begin with a training
        with error_context(f"stages.{name}.pairs.sampling_method"):
            solvers.check(stage.pairs.sampling_method)
            if stage.pairs.sampling_method not in solvers.DETERMINISTIC:
                raise ValueError(
                    f"{stage.pairs.sampling_method!r} cannot make pairs: its images depend on more than their noise"
                )
            if cfg.minutes is not None and stage.pairs.sampling_method in solvers.HAS_TOLERANCES:
                raise ValueError(f"{stage.pairs.sampling_method!r} chooses its own number of evaluations, which fits no budget")
        if stage.pairs.guidance_scale != 1 and not classes_of(configs[teacher]):
            scale = stage.pairs.guidance_scale
            raise UserError(f"stages.{name}.pairs.guidance_scale={scale}: needs labels (model.args.num_classes)")
        return
    config = configs[name]
    if config.model.args.get("max_prompt_bytes"):
        raise UserError(f"{key}: model.args.max_prompt_bytes: routes are for networks with labels or without any")
    starts_from_teacher = teacher and "train.init_from" not in loading.overridden(stage.overrides)
    if starts_from_teacher and same_network(config) != same_network(configs[teacher]):
        raise UserError(f"{key}: model: must be that of {teacher}, from whose weights it starts")
    if config.data.name == "pairs":
        if config.flow.coupling != "paired":
            raise UserError(f"{key}: flow.coupling={config.flow.coupling}: must be paired, as it trains on pairs")
        source = cfg.stages[pairs].pairs if pairs else None
        if source is None:
            raise UserError(f"{key}: trains on pairs, and no stage before it makes any")
        if build_loss(config).needs_states and not source.keep_states:
            raise UserError(f"{key}: loss.name={config.loss.name}: needs stages.{pairs}.pairs.keep_states of at least 1")


def same_network(config: Config) -> tuple:
    """What networks must share for one to start from the other's weights; a flow may become a flow map, dropout may change."""
    free = ("two_times", "dropout", "num_classes")
    args = {key: value for key, value in config.model.args.items() if key not in free}
    return config.model.name, args, classes_of(config)  # no classes are the same as unset ones


def compare(cfg: RectifyConfig, folder: Path, rows: list[Row], costs: dict[str, Cost]) -> Row:
    """Write and print comparison.md, draw comparison.png. The row of the smallest distance at the smallest NFE."""
    first = first_config(cfg)
    accelerator = distributed.build_accelerator(first.train.mixed_precision)
    titles, straight, panels = {}, {}, []
    nfes = [*SHOWN_NFE, max(cfg.nfe)]
    classes = snapshot.load(folder / rows[0].network).model(decode=False).net.num_classes
    shown = COLUMNS * classes if classes else 10 * COLUMNS
    each = cfg.straightness_images * cfg.straightness_steps + shown * sum(nfes)
    total = sum(each * network_calls(row.scale) for row in rows)
    bar = distributed.progress(accelerator, total, "straightness deviation and figure (network calls)")
    for row in rows:
        snap = snapshot.load(folder / row.network)
        model = snap.model()
        distributed.prepare_model(model.net, accelerator)

        def advance(net, inputs, output) -> None:  # what a hook returns would replace the output
            bar.update(len(inputs[0]))

        model.net.register_forward_hook(advance)
        entry = {"weights": f"{row.network}@{snap.step}", "guidance_scale": row.scale, "method": row.method}
        titles[table.model_key(entry)] = row.title
        settings = SamplerSettings(guidance_scale=row.scale)
        indices = range(cfg.straightness_images)
        mean, error = mean_straightness_deviation(
            accelerator, model, snap.image_shape, indices, settings, cfg.straightness_steps
        )
        straight[row.title] = f"{mean:.4f} ± {error:.4f}"
        panels.append([panel(accelerator, model, snap.image_shape, row.method, n, row.scale) for n in nfes])
    bar.close()
    results = table.rows_of(folder / "evaluation", cfg.n_samples, cfg.feature_extractor)
    entries = table.aggregate([r for r in results if r.get("steps") in cfg.nfe])
    distance = table.distance_name(entries)
    metrics = [distance, "accuracy"] if all("accuracy" in e["metrics"] for e in entries) else [distance]
    cost = {row.title: costs[row.network] for row in rows}
    extra = {
        "images": {title: f"{c.images:,}" for title, c in cost.items()},
        "minutes": {title: f"{c.minutes:.1f}" for title, c in cost.items()},
        "network passes": {title: f"{c.passes / 1e6:.2f} M" for title, c in cost.items()},
        "straightness deviation": straight,
    }
    text = table.by_nfe(entries, metrics, titles, extra)
    note = (
        f"Cells: {' / '.join(metrics)} of {cfg.n_samples:,} images, Euler steps where no method is named. Images, minutes and "
    )
    note += "network passes are those of the whole route, teachers and pairs included; a backward pass counts as two, a "
    note += (
        f"derivative too. Straightness deviation: its mean over {cfg.straightness_images} images ± standard error; 0: straight."
    )
    if any(network_calls(row.scale) == 2 for row in rows):
        note += " With guidance (w) each velocity evaluation is two network calls, so NFE 2 costs four."
    files.write_text(folder / "comparison.md", f"{text}\n\n{note}\n")
    columns = [list(column) for column in zip(*panels, strict=True)]
    pictures.picture_table(folder / "comparison.png", columns, [f"NFE {n}" for n in nfes], list(titles.values()))
    print(f"\n{text}\n\n{note}")
    fewest = [e for e in entries if e["NFE"] == min(cfg.nfe) and table.model_key(e) in titles]  # others are of earlier calls
    best = titles[table.model_key(min(fewest, key=lambda e: e["metrics"][distance].mean))]
    return next(row for row in rows if row.title == best)


def panel(
    accelerator: Accelerator, model: FlowModel, image_shape: tuple[int, int, int], method: str, steps: int, scale: float
) -> np.ndarray:
    """A row a class (without classes: ten rows), each column from one and the same noise: uint8 [H, W] or [H, W, 3]."""
    shown = []
    for label in range(model.net.num_classes or 1):
        labels = (label,) if model.net.num_classes else None
        settings = SamplerSettings(method, steps, scale, labels=labels)
        n = COLUMNS if model.net.num_classes else 10 * COLUMNS
        shown += [batch.images for batch in generate(accelerator, model, image_shape, [range(n)], settings)]
    picture = images.grid(torch.cat(shown), COLUMNS, zoomed=False).permute(1, 2, 0).numpy()
    return picture[:, :, 0] if picture.shape[2] == 1 else picture


if __name__ == "__main__":
    cli_main(main)
