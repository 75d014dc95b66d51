"""The keys of scripts/rectify.py, which trains several models one after the other."""

from dataclasses import dataclass, field

from configs.schema import check, check_limits, limited


@dataclass
class ReflowStageConfig:
    n_pairs: int = limited(20_000, min=1)  # (noise, image) pairs
    sampling_method: str = "heun"  # a key of flow.solvers.SOLVERS
    sampling_steps: int = limited(8, min=1)  # steps of its solver
    guidance_scale: float = limited(1.0, min=0)  # 1: off
    real_fraction: float = limited(0.0, fraction=True)  # share of the pairs whose image is real


@dataclass
class RectifyConfig:
    folder: str = "runs/rectify"  # everything is written below it
    first: str = "configs/mnist_mini_cond.yaml"  # configuration of 1-RF
    reflow: str = "configs/mnist_reflow.yaml"  # configuration of 2-RF and later rounds
    distill: str = "configs/mnist_distill.yaml"  # configuration of the distilled model
    rounds: int = limited(2, min=1)  # flows before distillation: 2 is 1-RF and 2-RF
    first_pairs: ReflowStageConfig = field(default_factory=ReflowStageConfig)  # of 1-RF
    later_pairs: ReflowStageConfig = field(default_factory=ReflowStageConfig)  # of the flows after it
    nfe: list[int] = field(default_factory=lambda: [1, 2, 3, 4, 8, 50])  # Euler steps of the table
    n_samples: int = limited(2_000, min=2)  # images a cell of the table
    feature_extractor: str = "mnist"  # of evaluate.py
    straightness_images: int = limited(200, min=2)  # over which the straightness deviation is the mean
    straightness_steps: int = limited(50, min=1)  # Euler steps of its integral

    def validate(self) -> None:
        """What the scripts that are called would only find out after the first training."""
        check_limits(self)
        check(self, "nfe", lambda v: v and all(n >= 1 for n in v) and len(set(v)) == len(v), "distinct numbers from 1")
