"""Checks of the configuration for scripts/doctor/: what is built of it, and its numbers against each other and the data."""

import math
from typing import Any

import torch

import datasets
import models
from configs import schema
from configs.errors import first_line
from configs.schema import Config, DataConfig
from datasets import DataSet, DataSpec
from flow import losses, time_samplers
from flow.model import set_defaults
from flow.runtime import distributed
from flow.runtime.errors import error_context
from flow.training import data_loader
from flow.training.checks import check_conditioning
from flow.training.evaluation import check_start
from flow.training.flow_task import FlowTask
from flow.training.output_checks import check_forward
from flow.training.validation import ValidationLoss
from scripts.doctor.context import Context, Lines

IMAGES_LOOKED_AT = 500
MIN_LONG_STEPS = 0.002  # share of the steps of a flow map (docs/few_steps.md)
MIN_STORED = 10  # averages of a width, for others to be reconstructed (docs/averages.md)
USUAL_SHAPES = ((4, 32, 32), (3, 64, 64), (1, 28, 28), (1, 8, 8), (2,))  # that stand in for missing latents and images


def data(context: Context) -> Lines:
    """Present, readable, finite; for folders, images spread over the whole set."""
    cfg = context.cfg.data
    dataset = distributed.main_process_first(context.accelerator, lambda: build_or_reason(cfg))
    reason = dataset if isinstance(dataset, str) else "another process lacks them, see its line"
    if distributed.any_process(context.accelerator, isinstance(dataset, str)):
        yield "fail", f"data: {reason}"
        return
    context.data = dataset
    text = f"{cfg.name}, {len(dataset):,} of shape {'x'.join(map(str, dataset.image_shape))}"
    text += f", {len(dataset.class_names)} classes" if dataset.labels is not None else ", no labels"
    for note in dataset.notes:
        yield "warn", note
    if dataset.access == "memory":
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


def build_or_reason(cfg: DataConfig) -> DataSet | str:
    """The data set, or why it is not to be had: an exception would leave the other processes waiting."""
    try:
        return DataSpec.of(cfg).build()
    except (ValueError, FileNotFoundError) as error:
        return first_line(error)


def network(context: Context) -> Lines:
    """Fits the images and the labels; attention that matches no level is refused by the network."""
    cfg = context.cfg
    names: tuple[str, ...] = ()
    if context.data is not None and context.data.labels is not None:
        names = context.data.class_names
    schema.set_auto_classes(cfg, names)
    if context.data is None:
        yield "pass", without_data(cfg)
        return
    with error_context("model"):
        net: Any = models.build(cfg.model.name, context.data.image_shape, cfg.model.args)
        set_defaults(net)
    text = f", {net.num_classes} classes" if net.num_classes is not None else ""
    yield "pass", f"{cfg.model.name}, {parameters(net)}{text}"
    check_conditioning(context.data, net)
    check_forward(cfg.model.name, net, context.data.image_shape, context.accelerator)
    if context.data.labels is not None and not (net.num_classes or net.max_prompt_bytes):
        yield (
            "warn",
            f"the data has labels that the network does not use; model.args.num_classes={len(context.data.class_names)}",
        )
    if cfg.model.name == "unet" and not cfg.model.args.get("attention_resolutions", [1]):
        yield "warn", "model.args.attention_resolutions=[]: a U-Net without attention; name a level's side in pixels"
    context.net = net.to("meta")  # the memory is for the trial


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


def times_stored(cfg: Config) -> int:
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


def checkpoints(context: Context) -> Lines:
    """How much of the run a crash can cost."""
    cfg = context.cfg.train
    own = cfg.checkpoint_every_steps
    every = [n for n in (cfg.checkpoint_every_steps, context.cfg.evaluate.every_steps) if n]
    if not every or min(every) >= cfg.steps:
        yield "warn", f"train.checkpoint_every_steps={own}: a crash costs the whole run; set it to {max(1, cfg.steps // 10)}"
    else:
        yield "pass", f"a checkpoint every {min(every):,} of {cfg.steps:,} steps"


def num_checkpoints(cfg: Config) -> int:
    """How many a training writes: those of its own interval and of the evaluation, and the last."""
    steps = cfg.train.steps
    intervals = (cfg.train.checkpoint_every_steps, cfg.evaluate.every_steps)
    return len({steps, *(k for every in intervals if every for k in range(every, steps, every))})


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
        check_start(task, context.run_dir)
        images = f"{cfg.n_samples:,} images, {cfg.sampling_method}, {cfg.sampling_steps} steps"
        yield "pass", f"{', '.join(cfg.metrics)} of {images}, every {cfg.every_steps:,} steps"
