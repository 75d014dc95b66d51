"""The keys of scripts/rectify/, which trains models by several routes to few steps and compares them."""

import re
from dataclasses import dataclass, field

from configs.errors import UserError
from configs.keys import check, check_limits, limited


@dataclass
class PairsConfig:
    n_pairs: int = limited(20_000, min=1)  # (noise, image) pairs; `minutes` replaces it
    sampling_method: str = "heun"  # a solver of docs/solvers.md
    sampling_steps: int = limited(8, min=1)  # steps of its solver
    guidance_scale: float = limited(1.0, min=0)  # 1: off
    real_fraction: float = limited(0.0, fraction=True)  # share of the pairs whose image is real
    keep_states: int = limited(0, min=0)  # stored states of each path, for loss.name=trajectory


@dataclass
class StageConfig:
    """A training, or the pairs of the network before it."""

    config: str | None = None  # YAML of a training; it starts from the previous network, unless it overrides train.init_from
    overrides: list[str] = field(default_factory=list)  # `key=value` of the training
    pairs: PairsConfig | None = None  # or pairs of the network before it, for the trainings after it
    share: float = limited(0.0, fraction=True)  # of `minutes`


@dataclass
class RouteConfig:
    stages: list[str] = field(default_factory=list)  # stages in order; routes with the same first stages share them
    guidance_scale: list[float] = field(default_factory=lambda: [1.0])  # a row of the table each
    methods: list[str] = field(default_factory=lambda: ["euler"])  # solvers, each a row: euler, consistency, ...


@dataclass
class RectifyConfig:
    folder: str = "runs/rectify"  # everything is written below it
    minutes: float | None = None  # training time of each route; a trial run sets steps and pairs; null: as configured
    stages: dict[str, StageConfig] = field(default_factory=dict)  # by the name of their folder
    routes: dict[str, RouteConfig] = field(default_factory=dict)  # by their name in the table
    nfe: list[int] = field(default_factory=lambda: [1, 2, 4, 8])  # NFE columns of the table
    n_samples: int = limited(2_000, min=2)  # images for each cell of the table
    feature_extractor: str = "mnist"  # of evaluate.py
    straightness_images: int = limited(200, min=2)  # images, over which the straightness deviation is averaged
    straightness_steps: int = limited(50, min=1)  # Euler steps of its integral

    def validate(self) -> None:
        """What the scripts that are called would only find out after the first training. Raises UserError."""
        check_limits(self)
        check(self, "nfe", lambda v: v and all(n >= 1 for n in v) and len(set(v)) == len(v), "distinct numbers from 1")
        check(self, "minutes", lambda v: v is None or v > 0, "more than 0, or null")
        check(self, "routes", bool, "at least one route")
        for name, stage in self.stages.items():
            if not re.fullmatch(r"[\w+-]+", name):
                raise UserError(f"stages.{name}: a name is letters, digits, _, + and -, as it names a folder")
            if (stage.config is None) == (stage.pairs is None):
                raise UserError(f"stages.{name}: needs either config, for a training, or pairs")
            if stage.pairs is not None:
                self._check_pairs(f"stages.{name}.pairs", stage.pairs)
        for name, route in self.routes.items():
            self._check_route(name, route)

    def before(self, route: RouteConfig, k: int) -> tuple[str | None, str | None]:
        """The training and the pairs that stage number k of the route builds on: the last ones before it."""
        earlier = route.stages[:k]
        trained = [name for name in earlier if self.stages[name].config is not None]
        paired = [name for name in earlier if self.stages[name].pairs is not None]
        return (trained[-1] if trained else None), (paired[-1] if paired else None)

    def _check_pairs(self, key: str, pairs: PairsConfig) -> None:
        """What make_pairs refuses."""
        steps = pairs.sampling_steps
        rule = f"less than sampling_steps={steps}, as a path has its states at the ends of its steps but the last"
        check(self, f"{key}.keep_states", lambda v: v < steps, rule)
        if pairs.keep_states:
            rule = "0 with keep_states, as no path of the flow ends at a real image"
            check(self, f"{key}.real_fraction", lambda v: v == 0, rule)

    def _check_route(self, name: str, route: RouteConfig) -> None:
        key = f"routes.{name}"
        if unknown := next((stage for stage in route.stages if stage not in self.stages), None):
            raise UserError(f"{key}.stages: {unknown!r} is no stage; there are {', '.join(self.stages)}")
        if not route.stages or any(self.stages[end].config is None for end in (route.stages[0], route.stages[-1])):
            raise UserError(f"{key}.stages={route.stages}: must begin and end with a training")
        if not route.guidance_scale or not route.methods or any(w < 0 for w in route.guidance_scale):
            raise UserError(f"{key}: needs methods, and guidance scales of 0 or more")
        for k, stage in enumerate(route.stages):
            for other, there in self.routes.items():
                if stage in there.stages and self.before(there, there.stages.index(stage)) != self.before(route, k):
                    raise UserError(
                        f"{key}.stages: {stage!r} builds on other stages than in routes.{other}; give it a new name"
                    )
        if self.minutes is None:
            return
        if none := next((stage for stage in route.stages if not self.stages[stage].share), None):
            raise UserError(f"stages.{none}.share=0: must be more than 0, its share of the {self.minutes:g} minutes")
        total = sum(self.stages[stage].share for stage in route.stages)
        if abs(total - 1) > 1e-6:
            raise UserError(f"{key}.stages: their shares of the minutes add up to {total:g}, not to 1")
