"""Checks machine and configuration before hours are spent: `python -m scripts.doctor -c configs/mnist.yaml [key=value ...]`.

Start it as the training would be started (`accelerate-launch ... -m scripts.doctor`). Each line is pass, warn or fail, with the
fix. The last ones come from a real run of train.py of a few steps, with a checkpoint and a preview, in a temporary folder:
seconds a step, memory, disk, and when the training would be over. Exit code 0 where nothing failed, else 2.
"""

import math
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import torch
from accelerate import Accelerator

import datasets
import models
from configs import loading, schema
from configs.errors import UserError
from configs.schema import Config
from flow import losses, time_samplers
from flow.runtime import cli, commands, distributed
from flow.runtime.errors import cli_main, error_context
from flow.training import data_loader
from flow.training.evaluation import check_evaluation
from flow.training.flow_task import FlowTask, validate_conditioning
from flow.training.run_dir import open_run
from flow.training.trackers import TRACKERS
from flow.training.validation import ValidationLoss
from scripts.doctor.machine import feature_weights, versions
from scripts.doctor.trial import STEPS, Trial, try_training

EXAMPLES = """\
  python -m scripts.doctor -c configs/mnist.yaml
  python -m scripts.doctor -c configs/cifar10.yaml -mp auto train.batch_size=256
  accelerate-launch --config_file configs/accelerate/eight_gpus.yaml -m scripts.doctor -c configs/cifar10.yaml -mp auto"""


IMAGES_LOOKED_AT = 500
MIN_LONG_STEPS = 0.002  # share of the steps of a flow map (docs/few_steps.md)
MIN_STORED = 10  # averages of a width, for others to be reconstructed (docs/averages.md)
USUAL_SHAPES = ((4, 32, 32), (3, 64, 64), (1, 28, 28), (1, 8, 8), (2,))  # that stand in for missing latents and images
GIB = 2**30


@dataclass
class Context:
    """What the checks examine; what an earlier check could not build stays None."""

    args: object  # of the command line
    cfg: Config
    accelerator: Accelerator
    run_dir: Path
    data: object = None
    net: torch.nn.Module | None = None  # without weights, on the meta device
    trial: Trial | None = None
    lines: list[tuple[str, str, str]] = field(default_factory=list)  # (level, name, text)


def parse_args():
    return cli.parse_training(cli.Parser(__doc__, EXAMPLES))


def main() -> None:
    args = parse_args()
    cfg = loading.load(args.config, args.overrides)
    accelerator = distributed.build_training_accelerator(cfg.train, Path(tempfile.gettempdir()), TRACKERS)
    context = Context(args, cfg, accelerator, args.exp_dir or Path("runs") / Path(args.config or "run").stem)
    for check in CHECKS:
        try:
            for level, text in check(context):
                report(context, level, check, text)
        except UserError as error:
            report(context, "fail", check, str(error))
    failed = sum(level == "fail" for level, _, _ in context.lines)
    warned = sum(level == "warn" for level, _, _ in context.lines)
    counts = f"{failed} failed, {warned} warned, {len(context.lines) - failed - warned} passed"
    if failed:
        accelerator.print(cli.summary(counts, args.start, "fix what failed and start this command again"))
        sys.exit(2)
    train = ["train.py", *(["-c", args.config] if args.config else []), "-e", context.run_dir, *args.overrides]
    accelerator.print(cli.summary(counts, args.start, f"start the training with: {commands.relaunched(*train)}"))


def report(context: Context, level: str, check: Callable, text: str) -> None:
    name = check.__name__.replace("_", " ")
    context.lines.append((level, name, text))
    context.accelerator.print(f"{level}  {name}: {text}", flush=True)


Lines = Iterator[tuple[str, str]]  # (pass | warn | fail, the result and how to fix it)


def devices(context: Context) -> Lines:
    """Processes against GPUs; build_accelerator has refused a launcher that starts too few."""
    accelerator, gpus = context.accelerator, torch.cuda.device_count()
    here = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    text = f"{accelerator.num_processes} process(es) on {accelerator.device.type}, {torch.get_num_threads()} thread(s) each"
    if accelerator.device.type == "cuda" and here < gpus:
        yield "warn", f"{text}, but {gpus} GPUs; start with accelerate-launch --multi_gpu --num_processes {gpus}"
    elif accelerator.device.type == "cuda" and here > gpus:
        yield "fail", f"{text}, but only {gpus} GPU(s); start with accelerate-launch --num_processes {gpus}"
    elif Path("/dev/nvidia0").exists() and not gpus:
        yield "fail", f"{text}: there is an NVIDIA GPU that torch {torch.__version__} does not see; install torch with CUDA"
    else:
        yield "pass", text
    precision = accelerator.mixed_precision
    if gpus and precision == "no" and torch.cuda.is_bf16_supported(including_emulation=False):
        yield "warn", "train.mixed_precision=no: this GPU has bf16, which is faster; start with -mp auto"
    else:
        yield "pass", f"train.mixed_precision={precision}"


def folder(context: Context) -> Lines:
    """Free for a new run, and writable."""
    open_run(context.args.config, context.args.exp_dir, None, context.args.overrides, Config)
    parent = existing(context.run_dir)
    if not os.access(parent, os.W_OK) or os.statvfs(parent).f_flag & os.ST_RDONLY:
        yield "fail", f"{context.run_dir}: {parent} cannot be written to; name another folder with -e"
    else:
        yield "pass", f"{context.run_dir} is free"


def existing(path: Path) -> Path:
    """The nearest folder above that exists."""
    path = path.absolute()
    return path if path.is_dir() else existing(path.parent)


def data(context: Context) -> Lines:
    """Present, readable, finite; for folders, images spread over the whole set."""
    cfg = context.cfg.data
    with error_context("data"):
        dataset = distributed.main_process_first(context.accelerator, lambda: datasets.build(cfg.name, cfg.root, cfg.args))
    context.data = dataset
    text = f"{cfg.name}, {len(dataset):,} of shape {'x'.join(map(str, dataset.image_shape))}"
    text += f", {len(dataset.class_names)} classes" if dataset.labels is not None else ", no labels"
    for note in dataset.notes:
        yield "warn", note
    if dataset.access == "memory":
        if not torch.isfinite(dataset.images if dataset.images.is_floating_point() else torch.zeros(1)).all():
            yield "fail", f"{text}: not all values are finite numbers; generate it again"
            return
        yield "pass", text
        return
    looked_at = sorted({k * len(dataset) // IMAGES_LOOKED_AT for k in range(IMAGES_LOOKED_AT)})
    for k in looked_at:
        try:
            dataset[k]
        except ValueError as error:
            yield "fail", f"{error}; remove or replace the file"
            return
    yield "pass", f"{text}; {len(looked_at):,} images were read and are whole"


def network(context: Context) -> Lines:
    """Fits the images and the labels; attention that matches no level is refused by the network."""
    cfg, names = context.cfg, ()
    if context.data is not None and context.data.labels is not None:
        names = context.data.class_names
    schema.set_auto_classes(cfg, names)
    if context.data is None:
        yield "pass", without_data(cfg)
        return
    with error_context("model"), torch.device("meta"):
        context.net = models.build(cfg.model.name, context.data.image_shape, cfg.model.args)
    text = f", {context.net.num_classes} classes" if context.net.num_classes is not None else ""
    yield "pass", f"{cfg.model.name}, {parameters(context.net)}{text}"
    validate_conditioning(context.data, context.net)
    if context.data.labels is not None and not (context.net.num_classes or context.net.max_prompt_bytes):
        yield (
            "warn",
            f"the data has labels that the network does not use; model.args.num_classes={len(context.data.class_names)}",
        )
    if cfg.model.name == "unet" and not cfg.model.args.get("attention_resolutions", [1]):
        yield "warn", "model.args.attention_resolutions=[]: a U-Net without attention; name a level's side in pixels"


def parameters(net: torch.nn.Module) -> str:
    return f"{sum(p.numel() for p in net.parameters()) / 1e6:.2f} M parameters"


def without_data(cfg: Config) -> str:
    """The network and its size where there are no data: for the shape that they have, or for a usual one that fits."""
    expected = datasets.expected_shape(cfg.data.name, cfg.data.args)
    with error_context("model"), torch.device("meta"):
        for shape in [expected] if expected else USUAL_SHAPES:
            try:
                net = models.build(cfg.model.name, shape, cfg.model.args)
                break
            except ValueError:
                if shape in (expected, USUAL_SHAPES[-1]):
                    raise
    about = "" if expected else "about "
    kind = "x".join(map(str, shape))
    return f"{cfg.model.name}, {about}{parameters(net)} (for data of shape {kind}); whether it fits the data is not known yet"


def batch(context: Context) -> Lines:
    """The global batch over processes and micro-batches, against the data set."""
    cfg, processes = context.cfg.train, context.accelerator.num_processes
    rows = data_loader.micro_batch_size(cfg.batch_size, processes, cfg.gradient_accumulation_steps)
    text = f"{cfg.batch_size} images = {processes} process(es) x {cfg.gradient_accumulation_steps} micro-batch(es) x {rows}"
    if context.data is not None and cfg.batch_size > len(context.data):
        yield "warn", f"{text}: more than the {len(context.data):,} of the data set; use a smaller train.batch_size"
    else:
        yield "pass", text


def ema(context: Context) -> Lines:
    """How much of the random start remains in the averages, and how many steps they span."""
    cfg, per_step = context.cfg, context.cfg.train.batch_size
    images = cfg.train.steps * per_step
    for half_life in schema.half_lives(cfg):
        remaining = start_left(cfg.train.steps, per_step, half_life, cfg.ema.warmup_ratio)
        longest = round(min(half_life, cfg.ema.warmup_ratio * images)) if cfg.ema.warmup_ratio else half_life
        less = f" (ema.warmup_ratio allows no more; ema.half_life_images={half_life} is not reached)" * (longest < half_life)
        text = f"half-life {longest:,} of {images:,} images{less}, {remaining:.1%} of the random start left at the end"
        if remaining > 0.01:
            yield "warn", f"{text}; set ema.half_life_images={max(1, images // 10)} or ema.warmup_ratio=0.05"
        elif half_life < 2 * per_step:
            yield "warn", f"{text}, but it averages over less than 3 steps; set ema.half_life_images={max(1, images // 10)}"
        else:
            yield "pass", text
    if cfg.ema.power_widths:
        times = times_stored(cfg)
        text = f"averages of the widths {', '.join(map(str, cfg.ema.power_widths))} are stored {times} time(s)"
        few = f"{text}, too few for other widths; set ema.power_every_steps={max(1, cfg.train.steps // 40)}"
        yield ("warn", few) if times < MIN_STORED else ("pass", text)


def times_stored(cfg: schema.Config) -> int:
    """How often a training stores its power-function averages."""
    return math.ceil(cfg.train.steps / (cfg.ema.power_every_steps or cfg.train.steps))


def start_left(steps: int, batch_size: int, half_life: int, warmup_ratio: float) -> float:
    """The share of the initial weights in the average after so many steps (see flow/training/ema.py)."""
    full = min(steps, math.floor(half_life / (warmup_ratio * batch_size))) if warmup_ratio > 0 else 0  # steps of warm-up
    harmonic = sum(1 / k for k in range(1, min(full, 1000) + 1)) + (math.log(full / 1000) if full > 1000 else 0.0)
    halvings = (harmonic / warmup_ratio if warmup_ratio > 0 else 0.0) + (steps - full) * batch_size / half_life
    return 0.5**halvings


def long_steps(context: Context) -> Lines:
    """Whether the training of a flow map has enough of the long steps that sampling in one or two evaluations takes."""
    cfg = context.cfg
    loss = losses.LOSSES.get(cfg.loss.name)
    if loss is None or not loss.needs_two_times or loss.needs_states:  # stored paths have times of their own
        return
    with error_context("flow.time_sampler"):
        inverse = time_samplers.build(cfg.flow.time_sampler, **cfg.flow.time_sampler_args)
    t = inverse((torch.arange(10_000, dtype=torch.float64) + 0.5) / 10_000)
    share = 2 * float((t < 0.1).double().mean() * (t > 0.9).double().mean())
    text = f"{share:.2%} of the steps that {cfg.loss.name} trains go from t below 0.1 to t above 0.9"
    if share < MIN_LONG_STEPS:
        yield "warn", f"{text}: few for sampling in one step; flow.time_sampler=uniform has 2% (docs/few_steps.md)"
    else:
        yield "pass", text


def learning_rate(context: Context) -> Lines:
    """The warm-up against the length of the run."""
    warmup, steps = context.cfg.optimizer.warmup_steps, context.cfg.train.steps
    text = f"optimizer.warmup_steps={warmup} of train.steps={steps}"
    if warmup >= steps:
        yield "warn", f"{text}: the learning rate never reaches optimizer.lr; set it to {steps // 20} or less"
    elif warmup > 0.2 * steps:
        yield "warn", f"{text}: more than a fifth of the run; {steps // 20} is usual"
    else:
        yield "pass", text


def pauses(context: Context) -> Lines:
    """How much of the run a crash can cost."""
    cfg = context.cfg.train
    own, every = cfg.checkpoint_every_steps, [n for n in (cfg.checkpoint_every_steps, context.cfg.evaluate.every_steps) if n]
    if not every or min(every) >= cfg.steps:
        yield "warn", f"train.checkpoint_every_steps={own}: a crash costs the whole run; set it to {max(1, cfg.steps // 10)}"
    else:
        yield "pass", f"a checkpoint every {min(every):,} of {cfg.steps:,} steps"


def trial(context: Context) -> Lines:
    """A few steps of train.py itself: speed, end, memory."""
    if any(level == "fail" for level, _, _ in context.lines):
        yield "warn", "skipped; fix what failed above"
        return
    cfg = context.cfg
    context.trial = result = try_training(context.args.config, context.args.overrides, context.accelerator)
    rate = cfg.train.batch_size / result.seconds_per_step
    yield "pass", f"{STEPS} steps of {result.seconds_per_step:.3g} s, {rate:,.0f} images/s; the first took {result.first:.3g} s"
    checkpoints, every = num_checkpoints(cfg), cfg.train.sample_every_steps
    previews = math.ceil(cfg.train.steps / every) if every else 1
    seconds = (
        cfg.train.steps * result.seconds_per_step + checkpoints * result.checkpoint_seconds + previews * result.preview_seconds
    )
    end = time.strftime("%Y-%m-%d %H:%M", time.localtime(time.time() + seconds))
    pauses = f"{checkpoints} checkpoint(s) of {result.checkpoint_seconds:.2g} s and {previews} preview(s) of"
    pauses += f" {result.preview_seconds:.2g} s"
    yield "pass", f"{cfg.train.steps:,} steps, {pauses} take {cli.duration(seconds)}: until {end}, if it starts now"


def num_checkpoints(cfg: Config) -> int:
    """How many a training writes: those of its own interval and of the evaluation, and the last."""
    steps, intervals = cfg.train.steps, (cfg.train.checkpoint_every_steps, cfg.evaluate.every_steps)
    return len({steps, *(k for every in intervals if every for k in range(every, steps, every))})


def memory(context: Context) -> Lines:
    """The peak of a process against the memory that is available to it."""
    if context.trial is None:
        return
    used = context.trial.peak_bytes
    if context.accelerator.device.type == "cuda":
        available, kind = torch.cuda.get_device_properties(context.accelerator.device).total_memory, "of the GPU"
    else:
        available, kind = (
            psutil.virtual_memory().total // int(os.environ.get("LOCAL_WORLD_SIZE", "1")),
            "that are its share of the machine",
        )
    text = f"a process takes {used / GIB:.2f} of {available / GIB:.1f} GiB {kind}"
    if used > 0.9 * available:
        yield "warn", f"{text}: little is left; double train.gradient_accumulation_steps"
    else:
        yield "pass", text


def disk(context: Context) -> Lines:
    """All checkpoints, the one being written, and all snapshots, against the free space."""
    if context.trial is None:
        return
    cfg, result = context.cfg.train, context.trial
    total = num_checkpoints(context.cfg)
    retained = min(total, cfg.keep_checkpoints or total)
    snapshots = min(total, cfg.keep_snapshots or total)
    # A snapshot and the average in its checkpoint are one file with two names.
    unlinked = max(0, snapshots - retained)
    needed = (retained + 1) * result.checkpoint_bytes + unlinked * result.snapshot_bytes
    averages = len(context.cfg.ema.power_widths) * times_stored(context.cfg)
    needed += averages * result.snapshot_bytes // len(schema.half_lives(context.cfg))
    free = shutil.disk_usage(existing(context.run_dir)).free
    files = f"{retained} checkpoint(s) and {snapshots} snapshot(s)" + (f" and {averages} stored averages" if averages else "")
    text = f"{files} need {needed / GIB:.2f} GiB, {free / GIB:.1f} GiB are free"
    if needed > free:
        yield "fail", f"{text}; keep fewer: train.keep_checkpoints=1, train.keep_snapshots=1, or name another disk with -e"
    elif needed > 0.8 * free:
        yield "warn", f"{text}: that leaves little"
    else:
        yield "pass", text


def features(context: Context) -> Lines:
    """Weights for the distances of evaluate.py."""
    if context.data is not None:
        yield feature_weights(context.data.image_shape)


def evaluation(context: Context) -> Lines:
    """The section evaluate against network and data; features of the reference are left to the training."""
    cfg = context.cfg.evaluate
    if context.net is None or not (cfg.every_steps or cfg.loss_every_steps):
        return
    task = FlowTask(context.cfg, context.accelerator)
    if cfg.loss_every_steps:
        ValidationLoss(task)
        yield "pass", f"validation loss of {cfg.loss_samples:,} samples every {cfg.loss_every_steps:,} steps"
    if cfg.every_steps:
        check_evaluation(task, context.run_dir)
        images = f"{cfg.n_samples:,} images, {cfg.sampling_method}, {cfg.sampling_steps} steps"
        yield "pass", f"{', '.join(cfg.metrics)} of {images}, every {cfg.every_steps:,} steps"


def packages(context: Context) -> Lines:
    """Installed versions against requirements.txt."""
    yield versions(Path(__file__).parents[2] / "requirements.txt")


CHECKS = [
    packages, devices, folder, data, network, long_steps, batch, learning_rate, ema, pauses, features, evaluation, trial,
    memory, disk,
]  # fmt: skip


if __name__ == "__main__":
    cli_main(main)
