"""Starts the jobs of jobs.py, each in a process of its own; short ones measure what a training step or an image takes."""

import json
import os
import statistics
import sys
import time
from pathlib import Path

from configs import loading
from configs.errors import UserError
from flow.runtime import commands, distributed, subprocesses

WARMUP_STEPS = 4  # first steps of a trial, not measured
TRIAL_STEPS = 20  # steps after them, measured


def start_job(job: dict, scratch: Path) -> dict:
    """The result of a job in a process of its own (or several); `scratch` is a folder for what it leaves behind.

    Raises UserError with the last line of a job that fails.
    """
    result = scratch / "result.json"
    result.unlink(missing_ok=True)
    job = {**job, "result": str(result), "scratch": str(scratch), "started": time.time()}
    launcher = [sys.executable]
    if job.get("processes", 1) > 1:
        launcher += ["-m", "torch.distributed.run", "--nproc_per_node", str(job["processes"])]
        launcher += ["--rdzv_backend", "c10d", "--rdzv_endpoint", "localhost:0"]
    words = ["-m", "scripts.benchmark.jobs", json.dumps(job)]
    environment = {**os.environ, **commands.variables(words)}
    status, stderr = subprocesses.run_quietly([*launcher, *words], environment)
    if status or not result.is_file():
        lines = [line for line in stderr.splitlines() if line.startswith("error: ")] or stderr.splitlines()[-1:]
        raise UserError(f"{job['kind']}: {(lines or ['it ended without a message'])[0].removeprefix('error: ')}")
    return json.loads(result.read_text(encoding="utf-8"))


def training_laps(config: str, overrides: list[str], scratch: Path) -> list[float]:
    """Seconds of the steps of a short training after its first steps, in a process of its own."""
    cfg = loading.load(config, overrides)
    precision = distributed.resolve_precision(cfg.train.mixed_precision)
    job = {
        "kind": "train", "variant": "project", "config": config, "overrides": overrides, "precision": precision,
        "compile": cfg.train.compile, "steps": TRIAL_STEPS, "warmup": WARMUP_STEPS, "sections": False,
    }  # fmt: skip
    return start_job(job, scratch)["laps"]


def seconds_per_step(rounds: list[list[float]]) -> float:
    """The mean over the steps of a short training of their medians over rounds of `training_laps`: the cost of a step may
    change during the training. The first sixth, which is not measured, counts as the three steps after it, which holds for
    alpha_flow and for flow maps with a `map_start` of 0 or of more than a quarter.
    """
    medians = [statistics.median(laps) for laps in zip(*rounds, strict=True)]
    return statistics.mean([statistics.median(medians[:3])] * WARMUP_STEPS + medians)


def sampling_seconds(config: str, overrides: list[str], scratch: Path) -> float:
    """Seconds of an image of one network evaluation in sampling, untrained weights, in a process of its own."""
    cfg = loading.load(config, overrides)
    precision = distributed.resolve_precision(cfg.train.mixed_precision)
    job = {
        "kind": "sample", "variant": "project", "config": config, "overrides": overrides, "precision": precision,
        "compile": False, "sampling_batch": 100, "warmup": 1, "sampling_batches": 5, "sampling_steps": 4,
    }  # fmt: skip
    result = start_job(job, scratch)
    return statistics.median(result["laps"]) / (result["images_per_lap"] * result["forwards"])


def name_of(precision: str) -> str:
    return "fp32" if precision == "no" else precision
