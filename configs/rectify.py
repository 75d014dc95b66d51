"""The keys of scripts/rectify.py, which trains several models one after the other."""

import math
from dataclasses import dataclass, field

from configs.schema import check


@dataclass
class ReflowStageConfig:
    n_pairs: int = 20_000  # (noise, image) pairs
    sampling_method: str = "heun"  # a key of flow.solvers.SOLVERS
    sampling_steps: int = 8  # steps of its solver
    guidance_scale: float = 1.0  # 1: off
    real_fraction: float = 0.0  # share of the pairs whose image is real


@dataclass
class RectifyConfig:
    folder: str = "runs/rectify"  # everything is written below it
    first: str = "configs/mnist_mini_cond.yaml"  # configuration of 1-RF
    reflow: str = "configs/mnist_reflow.yaml"  # configuration of 2-RF and later rounds
    distill: str = "configs/mnist_distill.yaml"  # configuration of the distilled model
    rounds: int = 2  # flows before distillation: 2 is 1-RF and 2-RF
    first_pairs: ReflowStageConfig = field(default_factory=ReflowStageConfig)  # of 1-RF
    later_pairs: ReflowStageConfig = field(default_factory=ReflowStageConfig)  # of the flows after it
    nfe: list[int] = field(default_factory=lambda: [1, 2, 3, 4, 8, 50])  # Euler steps of the table
    n_samples: int = 2_000  # images a cell of the table
    feature_extractor: str = "mnist"  # of evaluate.py
    straightness_images: int = 200  # over which the straightness deviation is the mean
    straightness_steps: int = 50  # Euler steps of its integral

    def validate(self) -> None:
        """What the scripts that are called would only find out after the first training."""
        for key in ("rounds", "straightness_steps", "first_pairs.n_pairs", "later_pairs.n_pairs"):
            check(self, key, lambda v: v >= 1, "at least 1")
        for key in ("first_pairs.sampling_steps", "later_pairs.sampling_steps"):
            check(self, key, lambda v: v >= 1, "at least 1")
        for key in ("first_pairs.guidance_scale", "later_pairs.guidance_scale"):
            check(self, key, lambda v: v >= 0 and math.isfinite(v), "0 or more, and finite")
        for key in ("first_pairs.real_fraction", "later_pairs.real_fraction"):
            check(self, key, lambda v: 0 <= v <= 1, "between 0 and 1")
        for key in ("n_samples", "straightness_images"):
            check(self, key, lambda v: v >= 2, "at least 2")
        check(self, "nfe", lambda v: v and all(n >= 1 for n in v) and len(set(v)) == len(v), "distinct numbers from 1")
