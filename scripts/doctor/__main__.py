"""Checks machine and configuration before hours are spent: `python -m scripts.doctor -c configs/mnist.yaml [key=value ...]`.

Start it as the training would be started (`accelerate-launch ... -m scripts.doctor`). Each line is pass, warn or fail, with the
mend. The last ones come from a real run of train.py of a few steps, with a checkpoint and a preview, in a temporary folder:
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
from configs import schema
from configs.schema import Config, UserError
from flow.runtime import cli, distributed
from flow.runtime.errors import cli_main, error_context
from flow.training import data_loader
from flow.training.flow_task import validate_conditioning
from flow.training.run_dir import open_run
from scripts.doctor.machine import feature_weights, versions
from scripts.doctor.trial import STEPS, Trial, try_training

EXAMPLES = """\
  python -m scripts.doctor -c configs/mnist.yaml
  python -m scripts.doctor -c configs/cifar10.yaml -mp bf16 train.batch_size=256
  accelerate-launch --config_file configs/accelerate/eight_gpus.yaml -m scripts.doctor -c configs/cifar10.yaml -mp bf16"""


IMAGES_LOOKED_AT = 500


USUAL_SHAPES = ((4, 32, 32), (3, 64, 64), (1, 28, 28), (1, 8, 8), (2,))  # that stand in for missing latents and images


GIB = 2**30


@dataclass
class Patient:
    """What is examined; what an earlier check could not make stays None."""

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
    cfg = schema.load(args.config, args.overrides)
    accelerator = distributed.build_training_accelerator(cfg.train, Path(tempfile.gettempdir()))
    patient = Patient(args, cfg, accelerator, args.exp_dir or Path("runs") / Path(args.config or "run").stem)
    for check in CHECKS:
        try:
            for level, text in check(patient):
                say(patient, level, check, text)
        except UserError as error:
            say(patient, "fail", check, str(error))
    failed = sum(level == "fail" for level, _, _ in patient.lines)
    warned = sum(level == "warn" for level, _, _ in patient.lines)
    accelerator.print(f"{failed} failed, {warned} warned, {len(patient.lines) - failed - warned} passed")
    if failed:
        sys.exit(2)


def say(patient: Patient, level: str, check: Callable, text: str) -> None:
    name = check.__name__.replace("_", " ")
    patient.lines.append((level, name, text))
    patient.accelerator.print(f"{level}  {name}: {text}", flush=True)


Lines = Iterator[tuple[str, str]]  # (pass | warn | fail, what was found and how to mend it)


def devices(patient: Patient) -> Lines:
    """Processes against GPUs; a launcher that starts too few of them has been refused by runtime.start."""
    accelerator, gpus = patient.accelerator, torch.cuda.device_count()
    here = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    told = f"{accelerator.num_processes} process(es) on {accelerator.device.type}, {torch.get_num_threads()} thread(s) each"
    if accelerator.device.type == "cuda" and here < gpus:
        yield "warn", f"{told}, but {gpus} GPUs; start with accelerate-launch --multi_gpu --num_processes {gpus}"
    elif accelerator.device.type == "cuda" and here > gpus:
        yield "fail", f"{told}, but only {gpus} GPU(s); start with accelerate-launch --num_processes {gpus}"
    elif Path("/dev/nvidia0").exists() and not gpus:
        yield "fail", f"{told}: there is an NVIDIA GPU that torch {torch.__version__} does not see; install torch with CUDA"
    else:
        yield "pass", told
    precision = patient.cfg.train.mixed_precision
    if gpus and precision == "no" and torch.cuda.is_bf16_supported():
        yield "warn", "train.mixed_precision=no: this GPU has bf16, which is faster; start with -mp bf16"
    else:
        yield "pass", f"train.mixed_precision={precision}"


def folder(patient: Patient) -> Lines:
    """Free to begin a run in, and writable."""
    open_run(patient.args.config, patient.args.exp_dir, None, patient.args.overrides, Config)
    parent = existing(patient.run_dir)
    if not os.access(parent, os.W_OK) or os.statvfs(parent).f_flag & os.ST_RDONLY:
        yield "fail", f"{patient.run_dir}: {parent} cannot be written to; name another folder with -e"
    else:
        yield "pass", f"{patient.run_dir} is free"


def existing(path: Path) -> Path:
    """The nearest folder above that is there."""
    path = path.absolute()
    return path if path.is_dir() else existing(path.parent)


def data(patient: Patient) -> Lines:
    """Present, readable, finite; for folders, images spread over the whole set."""
    cfg = patient.cfg.data
    with error_context("data"):
        found = distributed.main_process_first(patient.accelerator, lambda: datasets.build(cfg.name, cfg.root, cfg.args))
    patient.data = found
    told = f"{cfg.name}, {len(found):,} of shape {'x'.join(map(str, found.image_shape))}"
    told += f", {len(found.class_names)} classes" if found.labels is not None else ", no labels"
    for note in getattr(found, "notes", []):
        yield "warn", note
    if hasattr(found, "images"):
        if not torch.isfinite(found.images if found.images.is_floating_point() else torch.zeros(1)).all():
            yield "fail", f"{told}: not all values are finite numbers; make it again"
            return
        yield "pass", told
        return
    looked_at = sorted({k * len(found) // IMAGES_LOOKED_AT for k in range(IMAGES_LOOKED_AT)})
    for k in looked_at:
        try:
            found[k]
        except ValueError as error:
            yield "fail", f"{error}; remove or replace the file"
            return
    yield "pass", f"{told}; {len(looked_at):,} of the files were opened and are whole"


def network(patient: Patient) -> Lines:
    """Fits the images and the labels; attention that matches no level is refused by the network."""
    cfg, names = patient.cfg, ()
    if patient.data is not None and patient.data.labels is not None:
        names = patient.data.class_names
    schema.set_auto_classes(cfg, names)
    if patient.data is None:
        yield "pass", without_data(cfg)
        return
    with error_context("model"), torch.device("meta"):
        patient.net = models.build(cfg.model.name, patient.data.image_shape, cfg.model.args)
    told = f", {patient.net.num_classes} classes" if patient.net.num_classes is not None else ""
    yield "pass", f"{cfg.model.name}, {parameters(patient.net)}{told}"
    validate_conditioning(cfg, patient.data, patient.net)
    if patient.data.labels is not None and not (patient.net.num_classes or patient.net.max_prompt_bytes):
        yield (
            "warn",
            f"the data has labels that the network does not use; model.args.num_classes={len(patient.data.class_names)}",
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


def batch(patient: Patient) -> Lines:
    """The global batch over processes and micro-batches, against the data set."""
    cfg, processes = patient.cfg.train, patient.accelerator.num_processes
    rows = data_loader.micro_batch_size(cfg.batch_size, processes, cfg.gradient_accumulation_steps)
    told = f"{cfg.batch_size} images = {processes} process(es) x {cfg.gradient_accumulation_steps} micro-batch(es) x {rows}"
    if patient.data is not None and cfg.batch_size > len(patient.data):
        yield "warn", f"{told}: more than the {len(patient.data):,} of the data set; use a smaller train.batch_size"
    else:
        yield "pass", told


def ema(patient: Patient) -> Lines:
    """What the averages forget of the random start, and over how many steps they reach."""
    cfg, per_step = patient.cfg, patient.cfg.train.batch_size
    images = cfg.train.steps * per_step
    for half_life in schema.half_lives(cfg):
        left = start_left(cfg.train.steps, per_step, half_life, cfg.ema.warmup_ratio)
        told = f"half-life {half_life:,} of {images:,} images, {left:.1%} of the random start left at the end"
        if left > 0.01:
            yield "warn", f"{told}; set ema.half_life_images={max(1, images // 10)} or ema.warmup_ratio=0.05"
        elif half_life < 2 * per_step:
            yield "warn", f"{told}, but it averages over less than 3 steps; set ema.half_life_images={max(1, images // 10)}"
        else:
            yield "pass", told


def start_left(steps: int, batch_size: int, half_life: int, warmup_ratio: float) -> float:
    """The share of the initial weights in the average after so many steps (see flow/training/ema.py)."""
    full = min(steps, math.floor(half_life / (warmup_ratio * batch_size))) if warmup_ratio > 0 else 0  # steps of warm-up
    harmonic = sum(1 / k for k in range(1, min(full, 1000) + 1)) + (math.log(full / 1000) if full > 1000 else 0.0)
    halvings = (harmonic / warmup_ratio if warmup_ratio > 0 else 0.0) + (steps - full) * batch_size / half_life
    return 0.5**halvings


def learning_rate(patient: Patient) -> Lines:
    """The warm-up against the length of the run."""
    warmup, steps = patient.cfg.optimizer.warmup_steps, patient.cfg.train.steps
    told = f"optimizer.warmup_steps={warmup} of train.steps={steps}"
    if warmup >= steps:
        yield "fail", f"{told}: the learning rate never reaches optimizer.lr; set it to {steps // 20} or less"
    elif warmup > 0.2 * steps:
        yield "warn", f"{told}: more than a fifth of the run; {steps // 20} is usual"
    else:
        yield "pass", told


def pauses(patient: Patient) -> Lines:
    """How much of the run a crash can cost, and what it leaves to look at."""
    cfg = patient.cfg.train
    every = cfg.checkpoint_every_steps
    if not every or every >= cfg.steps:
        yield "warn", f"train.checkpoint_every_steps={every}: a crash costs the whole run; set it to {max(1, cfg.steps // 10)}"
    else:
        yield "pass", f"a checkpoint every {every:,} of {cfg.steps:,} steps"


def trial(patient: Patient) -> Lines:
    """A few steps of train.py itself: speed, end, memory."""
    if any(level == "fail" for level, _, _ in patient.lines):
        yield "warn", "left out, as training would not begin; mend what failed above"
        return
    cfg = patient.cfg
    patient.trial = found = try_training(patient.args.config, patient.args.overrides, patient.accelerator)
    rate = cfg.train.batch_size / found.seconds_per_step
    yield "pass", f"{STEPS} steps of {found.seconds_per_step:.3g} s, {rate:,.0f} images/s; the first took {found.first:.3g} s"
    checkpoints, previews = (
        math.ceil(cfg.train.steps / n) if n else 1 for n in (cfg.train.checkpoint_every_steps, cfg.train.sample_every_steps)
    )
    seconds = (
        cfg.train.steps * found.seconds_per_step + checkpoints * found.checkpoint_seconds + previews * found.preview_seconds
    )
    end = time.strftime("%Y-%m-%d %H:%M", time.localtime(time.time() + seconds))
    pauses = f"{checkpoints} checkpoint(s) of {found.checkpoint_seconds:.2g} s and {previews} preview(s) of"
    pauses += f" {found.preview_seconds:.2g} s"
    yield "pass", f"{cfg.train.steps:,} steps, {pauses} take {duration(seconds)}: until {end}, if it begins now"


def duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.1f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def memory(patient: Patient) -> Lines:
    """The peak of a process against what there is for it."""
    if patient.trial is None:
        return
    used = patient.trial.peak_bytes
    if patient.accelerator.device.type == "cuda":
        there, what = torch.cuda.get_device_properties(patient.accelerator.device).total_memory, "of the GPU"
    else:
        there, what = (
            psutil.virtual_memory().total // int(os.environ.get("LOCAL_WORLD_SIZE", "1")),
            "that are its share of the machine",
        )
    told = f"a process takes {used / GIB:.2f} of {there / GIB:.1f} GiB {what}"
    if used > 0.9 * there:
        yield "warn", f"{told}: little is left; double train.gradient_accumulation_steps"
    else:
        yield "pass", told


def disk(patient: Patient) -> Lines:
    """All checkpoints, with the one that is being written, and all snapshots."""
    if patient.trial is None:
        return
    cfg, found = patient.cfg.train, patient.trial
    total = math.ceil(cfg.steps / cfg.checkpoint_every_steps) if cfg.checkpoint_every_steps else 1
    kept = min(total, cfg.keep_checkpoints or total)
    snapshots = min(total, cfg.keep_snapshots or total)
    needed = (kept + 1) * found.checkpoint_bytes + max(0, snapshots - kept) * found.snapshot_bytes  # one file, two names
    free = shutil.disk_usage(existing(patient.run_dir)).free
    told = f"{kept} checkpoint(s) and {snapshots} snapshot(s) need {needed / GIB:.2f} GiB, {free / GIB:.1f} GiB are free"
    if needed > free:
        yield "fail", f"{told}; keep fewer: train.keep_checkpoints=1, train.keep_snapshots=1, or name another disk with -e"
    elif needed > 0.8 * free:
        yield "warn", f"{told}: that leaves little"
    else:
        yield "pass", told


def features(patient: Patient) -> Lines:
    """Weights for the distances of evaluate.py."""
    if patient.data is not None:
        yield feature_weights(patient.data.image_shape)


def packages(patient: Patient) -> Lines:
    """Installed versions against requirements.txt."""
    yield versions(Path(__file__).parents[2] / "requirements.txt")


CHECKS = [packages, devices, folder, data, network, batch, learning_rate, ema, pauses, features, trial, memory, disk]


if __name__ == "__main__":
    cli_main(main)
