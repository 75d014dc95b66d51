"""Checks of the machine for scripts/doctor/: what is installed, and whether it can run the training."""

import math
import os
import re
import shutil
import sys
import time
from importlib import metadata
from pathlib import Path

import psutil
import torch
from packaging.version import Version

from configs import schema
from configs.schema import Config
from flow.evaluation.classifiers import SIDES
from flow.evaluation.features import INCEPTION_FILE
from flow.runtime import distributed, messages
from flow.sampling.space import Space
from flow.training.run_dir import open_run
from scripts.doctor.configuration import num_checkpoints, times_stored
from scripts.doctor.context import Context, Lines
from scripts.doctor.trial import STEPS, try_training

GIB = 2**30


def packages(context: Context) -> Lines:
    """Installed versions against requirements.txt."""
    yield versions(Path(__file__).parents[2] / "requirements.txt")


def versions(requirements: Path) -> tuple[str, str]:
    """Lower bounds of `requirements`, up to the part for the tests, against what is installed."""
    text = requirements.read_text(encoding="utf-8").partition("# for the tests")[0]
    bounds = re.findall(r"^([\w.-]+)>=([\w.]+)$", text, re.M)
    wrong = []
    for name, bound in bounds:
        try:
            installed = metadata.version(name)
        except metadata.PackageNotFoundError:
            wrong.append(f"{name} is not installed")
            continue
        if Version(installed) < Version(bound):
            wrong.append(f"{name} is {installed}, older than {bound}")
    if wrong:
        return "fail", f"{', '.join(wrong)}; pip install -r requirements.txt"
    return (
        "pass",
        f"Python {sys.version.split()[0]}, torch {torch.__version__}, {len(bounds)} packages as in requirements.txt",
    )


def devices(context: Context) -> Lines:
    """Processes against GPUs; build_accelerator has refused a launcher that starts too few."""
    accelerator = context.accelerator
    gpus = torch.cuda.device_count()
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


def features(context: Context) -> Lines:
    """Weights for the distances of evaluate.py."""
    if context.data is not None:
        yield feature_weights(context.data.image_shape)


def feature_weights(image_shape: tuple[int, ...]) -> tuple[str, str]:
    """Whether evaluate.py has what it needs for images of this shape without a network."""
    if Space(image_shape).is_points:
        return "pass", "points are measured as they are"
    for name, side in SIDES.items():
        if image_shape == (1, side, side) and name != "cifar10":
            return "pass", f"evaluate with --feature_extractor {name}, whose weights are part of the repository"
    file = Path(torch.hub.get_dir()) / "checkpoints" / INCEPTION_FILE
    if file.is_file():
        return "pass", f"Inception's weights are in {file}"
    return (
        "warn",
        f"Inception's weights are not in {file.parent}; evaluate.py fetches them, or give a file with --feature_weights",
    )


def trial(context: Context) -> Lines:
    """A few steps of train.py itself: speed, end, memory."""
    if distributed.any_process(context.accelerator, any(level == "fail" for level, _, _ in context.lines)):
        yield "warn", "skipped; fix what failed above"
        return
    cfg = context.cfg
    parent = existing(context.run_dir)
    context.trial = result = try_training(context.args.config, context.args.overrides, context.accelerator, parent)
    rate = cfg.train.batch_size / result.seconds_per_step
    yield "pass", f"{STEPS} steps of {result.seconds_per_step:.3g} s, {rate:,.0f} images/s; the first took {result.first:.3g} s"
    checkpoints = num_checkpoints(cfg)
    every = cfg.train.sample_every_steps
    previews = math.ceil(cfg.train.steps / every) if every else 1
    seconds = (
        cfg.train.steps * result.seconds_per_step + checkpoints * result.checkpoint_seconds + previews * result.preview_seconds
    )
    end = time.strftime("%Y-%m-%d %H:%M", time.localtime(time.time() + seconds))
    pauses = f"{checkpoints} checkpoint(s) of {result.checkpoint_seconds:.2g} s and {previews} preview(s) of"
    pauses += f" {result.preview_seconds:.2g} s"
    ends = {"evaluation": cfg.evaluate.every_steps, "validation loss": cfg.evaluate.loss_every_steps}
    untimed = [f"{math.ceil(cfg.train.steps / every)} of the {name}" for name, every in ends.items() if every]
    more = f"; {' and '.join(untimed)} come on top of that" if untimed else ""
    yield "pass", f"{cfg.train.steps:,} steps, {pauses} take {messages.duration(seconds)}: until {end}, if it starts now{more}"


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
