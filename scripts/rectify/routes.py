"""The routes of scripts/rectify/: what they must be like, and what their stages have cost."""

from dataclasses import dataclass
from pathlib import Path

import datasets
from configs import loading, schema
from configs.errors import UserError
from configs.rectify import PairsConfig, RectifyConfig
from configs.schema import Config
from datasets import DataSpec
from datasets.pairs import read_manifest
from flow import solvers
from flow.evaluation import runner
from flow.evaluation.checks import check_before_training
from flow.evaluation.features import FEATURE_EXTRACTORS_REGISTRY
from flow.guidance import network_calls
from flow.likelihood import T_MAX
from flow.model import why_no_score
from flow.runtime.errors import error_context
from flow.sampling.space import Space
from flow.training.flow_task import build_loss
from flow.training.logging import read_metrics


@dataclass
class Cost:
    """What a stage took."""

    images: int = 0  # trained on, or made
    minutes: float = 0.0
    passes: float = 0.0  # of an image through the network, a backward pass counts as two

    def __add__(self, other: "Cost") -> "Cost":
        return Cost(self.images + other.images, self.minutes + other.minutes, self.passes + other.passes)


def stage_cost(cfg: RectifyConfig, name: str, elapsed: float) -> Cost:
    """The cost of a finished stage: the minutes of its steps without checkpoints and previews, or those of making its pairs,
    which took `elapsed` seconds (nan: unknown, as a kill came before they were noted)."""
    stage = cfg.stages[name]
    folder = Path(cfg.folder) / name
    if stage.pairs is not None:
        manifest = read_manifest(folder)
        generated, inverted = manifest["generated"], manifest["inverted"]
        return Cost(generated + inverted, elapsed / 60, pair_passes(stage.pairs, generated, inverted))
    assert stage.config is not None
    rows = [row for row in read_metrics(folder / "metrics.jsonl") if "images_per_second" in row]
    seen = [0, *(row["images"] for row in rows)]
    seconds = sum((now - last) / row["images_per_second"] for last, now, row in zip(seen, seen[1:], rows, strict=False))
    config = loading.load(stage.config, stage.overrides)
    return Cost(seen[-1], seconds / 60, seen[-1] * build_loss(config).passes)


def pair_passes(settings: PairsConfig, generated: float, inverted: float = 0) -> float:
    """Network passes of so many generated pairs, and of pairs of real images, whose noise comes from the flow solved backwards
    without guidance."""
    method, steps = settings.sampling_method, settings.sampling_steps
    calls = network_calls(settings.guidance_scale)
    return generated * calls * solvers.nfe(method, steps) + inverted * solvers.nfe(method, steps, T_MAX, 0)


def first_config(cfg: RectifyConfig) -> Config:
    """The configuration of the first training of all."""
    stage = cfg.stages[next(iter(cfg.routes.values())).stages[0]]
    return loading.load(stage.config, stage.overrides)


def check_routes(cfg: RectifyConfig) -> None:
    """Raises UserError for what would otherwise fail after hours, in the middle of a route."""
    configs = {name: loading.load(stage.config, stage.overrides) for name, stage in cfg.stages.items() if stage.config}
    for name, config in configs.items():
        if cfg.minutes is not None and "train.steps" in loading.overridden(cfg.stages[name].overrides):
            raise UserError(
                f"stages.{name}.overrides: train.steps is set by minutes={cfg.minutes:g}; set minutes=null or leave it out"
            )
        with error_context(str(cfg.stages[name].config)):
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


def check_table(cfg: RectifyConfig) -> None:
    """Load the feature extractor once, as evaluate.py will after the last training. Raises UserError where it is not to be had,
    or does not fit the images."""
    settings = runner.EvaluationSettings(
        owner="rectify", feature_extractor=cfg.feature_extractor, n_samples=cfg.n_samples, n_samples_key="n_samples"
    )  # fmt: skip
    check_before_training(first_config(cfg), settings)


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
                    data = DataSpec.of(config.data).build()
                schema.set_auto_classes(config, data.class_names if data.labels is not None else ())
            elif pairs:
                maker = cfg.before(route, route.stages.index(pairs))[0]
                config.model.args["num_classes"] = classes_of(configs[str(maker)])


def classes_of(config: Config) -> int | None:
    """The number of classes of the network, once `resolve_classes` has counted them; None for a network without labels."""
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
            if stage.pairs.sampling_method in solvers.HAS_TOLERANCES:
                raise ValueError(
                    f"{stage.pairs.sampling_method!r} chooses its own number of evaluations, which the table counts"
                )
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
