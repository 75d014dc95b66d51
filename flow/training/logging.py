"""The log of a run: log.txt, metrics.jsonl and trackers, and what the terminal shows."""

import math
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from tqdm import tqdm

from configs.errors import UserError, first_line
from flow.runtime import files, jsonl, messages
from flow.training import trackers

ERROR_PREFIX = "error: "  # of the line of log.txt about what ended a run


class Logger:
    """log.txt, metrics.jsonl and the trackers of accelerate, on the main process; all processes may call every method."""

    def __init__(self, accelerator: Accelerator, folder: Path, config: Any, first_step: int):
        """Rows of metrics.jsonl past `first_step`, from a run that was killed after its last checkpoint, are dropped.

        Damaged lines move to metrics.damaged.jsonl and are named in log.txt.
        """
        self.accelerator, self.folder = accelerator, folder
        self.metrics_file = folder / "metrics.jsonl"
        if accelerator.is_main_process:
            self._rewind(first_step)
        trackers.start(accelerator, folder, config, first_step)

    def info(self, line: str) -> None:
        """A line on the terminal and in log.txt."""
        if self.accelerator.is_main_process:
            tqdm.write(line)
            files.append_line(self.folder / "log.txt", line)

    @contextmanager
    def recording_errors(self) -> Iterator[None]:
        """An error that leaves the block is a line of log.txt too, so that a run that fails is told from a killed one. The
        terminal gets it from whoever handles it. Each process writes its own: a damaged image may be in the share of one."""
        try:
            yield
        except Exception as error:
            place = "" if self.accelerator.is_main_process else f"process {self.accelerator.process_index}: "
            kind = "" if isinstance(error, UserError) else f"{type(error).__name__}: "
            with suppress(OSError):  # a full disk, or a machine without the folder: the error itself matters more
                files.append_line(self.folder / "log.txt", f"{ERROR_PREFIX}{place}{kind}{first_line(error)}")
            raise

    def log(self, step: int, metrics: dict[str, float]) -> None:
        """A row of metrics.jsonl, and the same to the trackers."""
        if self.accelerator.is_main_process:
            jsonl.append(self.metrics_file, {"step": step, **metrics})
        with files.naming(self.folder / "tensorboard"):
            self.accelerator.log(metrics, step=step)

    def _rewind(self, step: int) -> None:
        """Leave the rows up to a step in metrics.jsonl, in their order and to the byte."""
        lines = jsonl.read_lines(self.metrics_file, damage_of)
        damaged = [line for line in lines if line.row is None]
        if damaged:
            aside = self.metrics_file.with_suffix(".damaged.jsonl")
            before = aside.read_bytes() if aside.exists() else b""
            files.write_bytes(aside, before + b"".join(line.raw + b"\n" for line in damaged))
            for line in damaged:
                self.info(f"warning: {jsonl.describe(self.metrics_file, line)}; it is now in {aside.name}")
        retained = [line for line in lines if line.row is not None and line.row["step"] <= step]
        if len(retained) < len(lines):
            files.write_bytes(self.metrics_file, b"".join(line.raw + b"\n" for line in retained))


def log_summary(logger: Logger, lines: list[str], unit: str, config: Any, step: int, graphed: bool) -> None:
    """The start of the log: the `lines` of a task, then batch and device.

    unit: what a batch holds. config: the section train. step: the training starts from it. graphed: a step is a CUDA graph.
    """
    for line in lines:
        logger.info(line)
    accelerator, micro = logger.accelerator, config.gradient_accumulation_steps
    rows = config.batch_size // (accelerator.num_processes * micro)
    logger.info(
        f"batch: {config.batch_size} {unit} = {accelerator.num_processes} process(es) x {micro} micro-batch(es) x {rows}; "
        f"{config.steps:,} steps = {config.steps * config.batch_size:,} {unit}"
    )
    logger.info(
        f"device: {accelerator.device.type}, precision {accelerator.mixed_precision}, "
        f"{torch.get_num_threads()} thread(s); run directory: {logger.folder}"
        + ("; a step is one CUDA graph" if graphed else "")
        + (f"; resuming from step {step}" if step else "")
    )


def show_beside_bar(bar: tqdm, metrics: dict[str, float], unit: str) -> None:
    """Metrics in a terminal."""
    rate = f"{metrics['images_per_second']:.0f} {unit}/s"
    bar.set_postfix_str(f"loss {metrics.get('loss', math.nan):.4f}, {rate}", refresh=False)


def print_row(accelerator: Accelerator, step: int, config: Any, metrics: dict[str, float], unit: str) -> None:
    """Metrics on a line of a file or pipe, where a bar would be a heap of carriage returns. config: the section train."""
    rate = metrics["images_per_second"]
    left = (config.steps - step) * config.batch_size / rate if rate > 0 else math.nan
    accelerator.print(
        f"step {step:{len(str(config.steps))}} of {config.steps}  loss {metrics.get('loss', math.nan):.4f}  "
        f"gradient norm {metrics.get('grad_norm', math.nan):.3g}  lr {metrics['learning_rate']:.2e}  {rate:.0f} {unit}/s  "
        f"{messages.duration(left)} left",
        flush=True,
    )


def read_metrics(path: Path) -> list[dict]:
    """The rows of a metrics.jsonl. Lines that are no rows are left out, each with a warning on stderr."""
    rows = []
    for line in jsonl.read_lines(path, damage_of):
        if line.row is None:
            tqdm.write(f"warning: {jsonl.describe(path, line)}", file=sys.stderr)
        else:
            rows.append(line.row)
    return rows


def damage_of(row: dict) -> str | None:
    """Why a JSON object is no row of metrics.jsonl, or None."""
    step = row.get("step")
    return None if isinstance(step, int) and jsonl.is_number(step) else "it has no whole number 'step'"
