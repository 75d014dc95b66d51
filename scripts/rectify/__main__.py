"""Routes to few steps, compared: trainings, pairs, table and figure by one command: `python -m scripts.rectify -c YAML`.

A route is a chain of stages: trainings (flow, reflow, distillation, flow map) and pairs of the network before. With `minutes`
every route takes as long as the others, its teachers and pairs included: the seconds of a step or a pair come from a trial
just before the stage, and what follows from them is stored in plan.json. Each stage is a command that a user would type, and
is printed. Run it again after a kill: it resumes and ends with the same files. Below `folder`: a folder for each stage,
evaluation/ (every cell of the table), comparison.md and comparison.png.
"""

import json
import math
import tempfile
import time
from collections.abc import Callable
from itertools import count
from pathlib import Path

from configs import loading
from configs.errors import UserError
from configs.rectify import RectifyConfig, RouteConfig
from datasets.shards import MANIFEST
from flow.evaluation import evaluate_command
from flow.runtime import cli, commands, files, flags, lock, messages, subprocesses
from flow.runtime.commands import evaluate_arguments, train_arguments
from flow.runtime.errors import CONTINUES, cli_main, error_context
from scripts.benchmark.trial import sampling_seconds, seconds_per_step, training_laps
from scripts.rectify.comparison import Row, compare, table_rows
from scripts.rectify.routes import Cost, check_routes, check_table, first_config, pair_passes, stage_cost

EXAMPLES = """\
  python -m scripts.rectify -c configs/mnist_rectify.yaml
  python -m scripts.rectify -c configs/digits_few_steps.yaml minutes=2 folder=runs/digits_two_minutes
  python -m scripts.rectify -c configs/mnist_rectify.yaml --launcher "accelerate-launch --multi_gpu --num_processes 8\""""
TRIAL_ROUNDS = 3


def parse_args():
    parser = cli.Parser(__doc__, EXAMPLES, kind=RectifyConfig, keys="configs/rectify.py")
    flags.add_config_flag(parser, "e.g. configs/mnist_rectify.yaml", required=True)
    flags.add_launcher_flag(parser, "each script")
    return parser.parse()


def main() -> None:
    args = parse_args()
    cfg = loading.load(args.config, args.overrides, kind=RectifyConfig)
    if args.launcher and cfg.minutes is not None:
        raise UserError(f"--launcher: minutes={cfg.minutes:g} is measured with one process; set minutes=null and train.steps")
    check_routes(cfg)
    check_table(cfg)
    with lock.folder(Path(cfg.folder)):
        Rectify(cfg, args.launcher, args.start).run()


class Rectify:
    """The stages in their order, then the comparison."""

    def __init__(self, cfg: RectifyConfig, launcher: str | None, start: float):
        self.cfg = cfg
        self.launcher = launcher
        self.start = start
        self.folder = Path(cfg.folder)
        self.plan_file = self.folder / "plan.json"
        self.rows = table_rows(cfg)

    def run(self) -> None:
        stages = {name: (route, k) for route in self.cfg.routes.values() for k, name in enumerate(route.stages)}
        self.plans()  # a damaged plan is named before hours of training
        self.count = len(stages) + len(self.rows) + 1
        self.done = 0
        for name, (route, k) in stages.items():
            self.announce(f"{'training' if self.cfg.stages[name].config else 'pairs'}: {name}")
            self.run_stage(name, *self.cfg.before(route, k))
        results = []
        for row in self.rows:
            self.announce(f"evaluation of {row.title}")
            results += evaluate_command.run(self.evaluation(row), self.launcher)
        self.announce("comparison")
        costs = {row.network: self.route_cost(row.route) for row in self.rows}
        best = compare(self.cfg, self.folder, self.rows, costs, results)
        result = f"comparison.md and comparison.png in {self.folder}"
        steps = min(self.cfg.nfe)
        words = ["--sampling_method", best.method, "--sampling_steps", str(steps), *commands.condition_flags(best.scale)]
        words += ["-mp", first_config(self.cfg).train.mixed_precision]
        sample = commands.sample_command(self.folder / best.network, f"{self.folder.name}_{best.network}", *words)
        print(messages.summary(result, self.start, f"{best.title} is best at NFE {steps}; sample with: {sample}"))

    def announce(self, title: str) -> None:
        self.done += 1
        print(f"\nstage {self.done} of {self.count}: {title} ({elapsed(self.start)} so far)", flush=True)

    def run_stage(self, name: str, teacher: str | None, pairs: str | None) -> None:
        """The command of a stage. The seconds of pairs add up in plan.json over the calls that make some of them."""
        stage = self.cfg.stages[name]
        arguments = self.training(name, teacher, pairs) if stage.config else self.pairs(name, teacher)
        before, start, seconds = self.shards(name), time.perf_counter(), self.plan(name).get("elapsed", 0.0)
        if stage.pairs is not None and self.plan(name).get("running"):  # a kill has left the time of its pairs unknown
            seconds = math.nan
        if stage.pairs is not None:
            self.record(name, running=True)
        try:
            subprocesses.run_command(arguments, self.launcher)
        finally:
            if stage.pairs is not None:
                worked = self.shards(name) > before or math.isnan(seconds)
                cost = {"elapsed": seconds + time.perf_counter() - start} if worked else {}
                self.record(name, running=False, **cost)

    def shards(self, name: str) -> int:
        """Whole files of pairs that a stage has written."""
        return sum(not path.name.startswith(files.TEMPORARY) for path in (self.folder / name).glob("*.safetensors"))

    def training(self, name: str, teacher: str | None, pairs: str | None) -> list[str]:
        stage = self.cfg.stages[name]
        assert stage.config is not None
        overrides = [*stage.overrides]
        content = loading.digest(loading.load(stage.config, overrides))
        if self.plan(name).get("content", content) != content:
            raise UserError(f"stages.{name}: {stage.config} or its overrides have changed since it began; name another folder")
        self.record(name, content=content)
        if teacher and "train.init_from" not in loading.overridden(overrides):
            overrides.append(commands.override("train.init_from", str(self.folder / teacher)))
        if loading.load(stage.config, overrides).data.name == "pairs":
            overrides.append(commands.override("data.args.path", str(self.folder / str(pairs))))

        def seconds(scratch: Path) -> float:
            return seconds_per_step([training_laps(str(stage.config), overrides, scratch) for _ in range(TRIAL_ROUNDS)])

        if (steps := self.fitted(name, seconds)) is not None:
            overrides.append(f"train.steps={steps}")
        return train_arguments(stage.config, self.folder / name, overrides)

    def pairs(self, name: str, teacher: str | None) -> list[str]:
        """The make_pairs command of a stage; each set has noise of its own."""
        stage = self.cfg.stages[name]
        assert stage.pairs is not None and teacher is not None
        settings = stage.pairs
        source = self.cfg.stages[teacher]

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
            if "minutes" in self.plan(name):
                raise UserError(f"minutes=null: {self.plan_file} is of another budget; name another folder")
            return None
        plan = self.plan(name)
        budget = {"minutes": self.cfg.minutes, "share": self.cfg.stages[name].share}
        if "count" not in plan:
            if any((self.folder / name / file).exists() for file in ("config.yaml", MANIFEST)):
                raise UserError(
                    f"minutes={self.cfg.minutes:g}: {self.folder / name} began without a budget; name another folder"
                )
            print(f"trial: what {'a step' if self.cfg.stages[name].config else 'a pair'} of {name} takes", flush=True)
            with tempfile.TemporaryDirectory() as scratch:
                seconds = trial(Path(scratch))
            fitting = max(1, round(60 * budget["minutes"] * budget["share"] / seconds))
            self.record(name, **budget, seconds=seconds, count=fitting)
            return fitting
        if budget != {key: plan.get(key) for key in budget}:
            raise UserError(f"minutes={self.cfg.minutes:g}: {self.plan_file} is of another budget; name another folder")
        return plan["count"]

    def plan(self, name: str) -> dict:
        return self.plans().get(name, {})

    def plans(self) -> dict[str, dict]:
        """plan.json: by stage what was fitted or measured."""
        if not self.plan_file.is_file():
            return {}
        with error_context(f"{self.plan_file}: is damaged; name another folder"):
            plans = files.read_json(self.plan_file)
            if not all(isinstance(plan, dict) and ("count" not in plan or "minutes" in plan) for plan in plans.values()):
                raise ValueError("a stage lacks entries")
        return plans

    def record(self, name: str, **entries: float | str | bool) -> None:
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
        costs = [stage_cost(self.cfg, name, self.plan(name).get("elapsed", math.nan)) for name in route.stages]
        return sum(costs, Cost())


def elapsed(start: float) -> str:
    return messages.duration(time.perf_counter() - start)


if __name__ == "__main__":
    cli_main(main, CONTINUES)
