"""Every configuration key, its default, its unit and its limits; `loading.py` merges them with a YAML file and overrides.

A new knob is one line here. The keys that end in `args` are free: the function that they go to checks them
against its signature.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from configs.keys import all_keys, check, check_limits, limited

MIXED_PRECISIONS = ("no", "fp16", "bf16")
PRECISION_CHOICES = ("auto", *MIXED_PRECISIONS)
PREDICTIONS = ("velocity", "data", "noise")
OPTIMIZERS = ("adamw", "muon")
SCHEDULES = ("constant", "linear", "cosine", "wsd")
NONFINITE_GRAD = ("raise", "skip")
INT64_LIMIT = 2**63  # for the whole numbers of torch
MAX_EMA_WIDTH = 12**-0.5  # 0.2887, the sigma_rel of an average with equal weights

Kind = TypeVar("Kind")  # a configuration: a dataclass of keys and sections with validate()
OF_WEIGHTS = ("data", "model", "flow", "loss")  # the sections that mean something where weights are used, not trained
AUTO = "auto"  # of model.args.num_classes: as many as the data set has


@dataclass
class DataConfig:
    name: str = "digits"  # digits, mnist, fashion_mnist, cifar10, folder, packed, toys; from scripts: pairs, latents
    root: str | None = None  # folder that holds the data sets; null: $FLOW_DATA, else ./data
    args: dict[str, Any] = field(default_factory=dict)  # arguments of the data set
    horizontal_flip: bool = False  # mirror each training image with probability 1/2
    num_workers: int = limited(2, min=0)  # processes that decode images, for data.name=folder
    autoencoder: str | None = None  # of latents: folder or hub id, if it has moved since they were encoded


@dataclass
class ModelConfig:
    name: str = "unet"  # unet (ADM's U-Net), mini_unet (small images: two resolutions, additive skips), dit (DiT), mlp (points)
    args: dict[str, Any] = field(
        default_factory=dict
    )  # of the network; num_classes (N, null, auto for folder and packed): labels; max_prompt_bytes: prompts; data_std: scaling


@dataclass
class SourceConfig:
    name: str = "gaussian"  # gaussian, or a data set (as data.name) whose samples the flow transfers; data.root holds it
    args: dict[str, Any] = field(default_factory=dict)  # arguments of that data set


@dataclass
class FlowConfig:
    path: str = "linear"  # linear (rectified flow), cosine (sine and cosine of t), vp (DDPM's linear beta)
    prediction: str = limited("velocity", choices=PREDICTIONS)  # the network's prediction: velocity | data | noise
    source: SourceConfig = field(default_factory=SourceConfig)
    coupling: str = "independent"  # independent, ot, aligned, paired, see docs/transfer.md
    coupling_args: dict[str, Any] = field(default_factory=dict)  # arguments of the coupling
    time_sampler: str = "uniform"  # draws t: uniform, logit_normal (middle), u_shaped (ends), exponential (noise), edm_skewed
    time_sampler_args: dict[str, Any] = field(default_factory=dict)  # arguments of the time sampler
    label_dropout: float = limited(0.1, fraction=True)  # probability that a label or prompt becomes the null one, for guidance


@dataclass
class LossConfig:
    name: str = "flow_matching"  # flow_matching, distillation, mean_flow, alpha_flow, trajectory; see docs/few_steps.md
    args: dict[str, Any] = field(default_factory=dict)  # arguments of the loss, among them the distance


@dataclass
class OptimizerConfig:
    name: str = limited(
        "adamw", choices=OPTIMIZERS
    )  # adamw | muon (for hidden matrices, AdamW for the rest); see docs/recipes.md
    lr: float = limited(2e-4, above=0)  # peak learning rate
    betas: list[float] = field(default_factory=lambda: [0.9, 0.999])  # of AdamW
    eps: float = limited(1e-8, above=0)  # of AdamW
    weight_decay: float = limited(0.0, min=0)  # of AdamW and Muon
    warmup_steps: int = limited(0, min=0)  # linear from 0
    schedule: str = limited("constant", choices=SCHEDULES)  # constant | linear | cosine | wsd; all but the first end at 0
    clip_grad_norm: float = limited(1.0, min=0)  # 0: off


@dataclass
class EmaConfig:
    half_life_images: Any = 500_000  # images after which a past value counts half in the average; one or a list of several
    warmup_ratio: float = limited(0.05, min=0)  # half-life is at most this share of the images seen so far; 0: no warm-up


@dataclass
class FlowEmaConfig(EmaConfig):
    power_widths: list[float] = field(
        default_factory=list
    )  # sigma_rel of the power-function averages to store, e.g. [0.05, 0.1]; others are reconstructed from them; []: off
    power_every_steps: int = limited(5_000, min=0)  # steps between stored averages, plus one at the end; 0: only at the end


@dataclass
class TrainConfig:
    steps: int = limited(100_000, min=1)  # optimizer steps
    batch_size: int = limited(128, min=1)  # images per optimizer step, over all processes and micro-batches
    gradient_accumulation_steps: int = limited(1, min=1)  # micro-batches per optimizer step
    mixed_precision: str = limited(
        "no", choices=PRECISION_CHOICES
    )  # no | fp16 | bf16 | auto: bf16 where the device has instructions for it, else no
    compile: bool = False  # torch.compile the network
    cuda_graph: bool = False  # on one GPU: run a training step as one CUDA graph, which speeds up small networks
    ddp_comm_hook: str = limited("no", choices=MIXED_PRECISIONS)  # no | fp16 | bf16: precision of gradients between processes
    init_from: str | None = None  # snapshot that a new run starts from; of train_vae: folder or hub id of an autoencoder
    log_every_steps: int = limited(50, min=1)  # steps between rows of metrics.jsonl, which are means over these steps
    sample_every_steps: int = limited(5_000, min=0)  # steps between preview grids, plus one at the end; 0: only at the end
    checkpoint_every_steps: int = limited(5_000, min=0)  # steps between checkpoints, plus one at the end; 0: only at the end
    keep_checkpoints: int = limited(2, min=0)  # number of latest checkpoints to keep; 0: all
    keep_snapshots: int = limited(0, min=0)  # number of latest snapshots to keep; 0: all
    log_with: list[str] = field(default_factory=lambda: ["tensorboard"])  # trackers by name; metrics.jsonl always
    timeout_minutes: float = 30.0  # a process that waits longer for the others stops
    nonfinite_grad: str = limited("raise", choices=NONFINITE_GRAD)  # raise | skip; for a step whose gradient is not finite


@dataclass
class PreviewConfig:
    n_samples: int = limited(64, min=1)  # images of the preview grid
    sampling_method: str = "heun"  # a solver of docs/solvers.md
    sampling_steps: int = limited(18, min=1)  # steps of its solver
    guidance_scale: float = limited(1.0, min=0)  # 1: off
    seed: int = limited(8888, min=0)  # of the noise


@dataclass
class EvaluateConfig:
    every_steps: int = limited(0, min=0)  # steps between evaluations (row and checkpoint), plus one at the end; 0: never
    metrics: list[str] = field(default_factory=lambda: ["fid", "isc", "accuracy"])  # as --metrics; see docs/evaluation.md
    n_samples: int = limited(10_000, min=2)  # images of a row
    sampling_method: str = "heun"  # a solver of docs/solvers.md
    sampling_steps: int = limited(18, min=1)  # steps of its solver
    guidance_scale: float = limited(1.0, min=0)  # 1: off
    seed: int = limited(8888, min=0)  # of the noise
    batch_size: int = limited(100, min=1)  # images of a batch of each process
    feature_extractor: str = "inception-v3-compat"  # as --feature_extractor of evaluate.py
    feature_layer: str | None = None  # null: that of the Fréchet distance
    feature_weights: str | None = None  # local file, for machines without network
    reference: str | None = None  # folder, npz file, NAME:train or NAME:test; null: the training set
    keep_best: str | None = None  # fid or another column of the table: RUN/best.safetensors is the snapshot with the best value
    loss_every_steps: int = limited(0, min=0)  # validation loss on held-out data, also at the end; 0: never
    loss_samples: int = limited(1_000, min=10)  # samples of the validation loss


class TrainerConfig:
    """What the configurations of the trainers share."""

    def validate(self) -> None:
        """Raises UserError for what the types cannot say. What needs data, network or processes is checked where those are."""
        for key in all_keys(type(self)):
            check(self, key, lambda v: not isinstance(v, int) or v < INT64_LIMIT, "less than 2^63")
        check_limits(self)
        check(self, "optimizer.betas", lambda v: len(v) == 2 and all(0 <= b < 1 for b in v), "two numbers in [0, 1)")
        check(self, "train.timeout_minutes", lambda v: 0 < v <= 43_200, "more than 0 and at most 43200, which is 30 days")
        check(self, "ema.half_life_images", _is_half_lives, "a number of images of at least 1, or a list of distinct ones")


@dataclass
class Config(TrainerConfig):
    seed: int = limited(0, min=0)  # of all that is random in training
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    flow: FlowConfig = field(default_factory=FlowConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    ema: FlowEmaConfig = field(default_factory=FlowEmaConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    preview: PreviewConfig = field(default_factory=PreviewConfig)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)

    def validate(self) -> None:
        super().validate()
        check(
            self, "evaluate.keep_best", lambda v: v is None or self.evaluate.every_steps, "null where evaluate.every_steps is 0"
        )
        rule = f"a list of distinct numbers above 0 and below {MAX_EMA_WIDTH:.4f}"
        check(self, "ema.power_widths", lambda v: len(set(v)) == len(v) and all(0 < w < MAX_EMA_WIDTH for w in v), rule)


def wants_auto_classes(config: Config) -> bool:
    """Whether the data set decides the number of classes: num_classes=auto, or unset for images of your own without prompts."""
    args = config.model.args
    default = AUTO if config.data.name in ("folder", "packed") and not args.get("max_prompt_bytes") else None
    return args.get("num_classes", default) == AUTO


def set_auto_classes(config: Config, class_names: Sequence[str]) -> None:
    """Replace num_classes=auto by the number of classes, or by null for fewer than two, which leave nothing to choose."""
    if wants_auto_classes(config):
        config.model.args["num_classes"] = len(class_names) if len(class_names) > 1 else None


def keep_auto_classes(config: Config, stored: Config) -> None:
    """Replace num_classes=auto by what a run or snapshot was trained with."""
    if wants_auto_classes(config):
        config.model.args.pop("num_classes", None)
        if "num_classes" in stored.model.args:
            config.model.args["num_classes"] = stored.model.args["num_classes"]


def half_lives(config: Any) -> list[int]:
    """ema.half_life_images as a list."""
    value = config.ema.half_life_images
    return list(value) if isinstance(value, list) else [value]


def power_widths(config: Any) -> list[float]:
    """ema.power_widths; autoencoders have none."""
    return config.ema.power_widths if isinstance(config, Config) else []


def _is_half_lives(value: Any) -> bool:
    values = value if isinstance(value, list) else [value]
    whole = all(isinstance(v, int) and not isinstance(v, bool) and 1 <= v < INT64_LIMIT for v in values)
    return whole and bool(values) and len(set(values)) == len(values)
