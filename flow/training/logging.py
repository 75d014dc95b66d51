"""What a run tells: log.txt, metrics.jsonl, accelerate's trackers; and the running means of the training loss."""

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor
from tqdm import tqdm

from configs import schema
from configs.schema import UserError
from flow.runtime import files, jsonl

TIME_BINS = 10


class Logger:
    """Writes on the main process; other processes may call every method."""

    def __init__(self, accelerator: Accelerator, run_dir: Path, config: Any, first_step: int):
        """Rows of metrics.jsonl past `first_step`, from a run that went on after its last checkpoint, are dropped.

        Damaged lines move to metrics.damaged.jsonl and are named in log.txt.
        """
        self.accelerator, self.run_dir = accelerator, run_dir
        self.metrics_file = run_dir / "metrics.jsonl"
        if accelerator.is_main_process:
            self._rewind(first_step)
        if config.train.log_with:
            flat = {key: _to_scalar(schema.get(config, key)) for key in schema.all_keys(type(config))}
            purge = {"tensorboard": {"purge_step": first_step + 1}} if "tensorboard" in config.train.log_with else {}
            accelerator.init_trackers("tensorboard", config=flat, init_kwargs=purge)

    def say(self, line: str) -> None:
        """A line on the terminal and in log.txt."""
        if self.accelerator.is_main_process:
            tqdm.write(line)
            files.append_line(self.run_dir / "log.txt", line)

    def log(self, step: int, metrics: dict[str, float]) -> None:
        """A row of metrics.jsonl, and the same to the trackers."""
        if self.accelerator.is_main_process:
            jsonl.append(self.metrics_file, {"step": step, **metrics})
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
                self.say(f"warning: {jsonl.describe(self.metrics_file, line)}; it is now in {aside.name}")
        retained = [line for line in lines if line.row is not None and line.row["step"] <= step]
        if len(retained) < len(lines):
            files.write_bytes(self.metrics_file, b"".join(line.raw + b"\n" for line in retained))


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


class LossStatistics:
    """Means over the steps since the last reading, kept on the device so that a step needs no synchronisation."""

    def __init__(self, device: torch.device, nonfinite_grad: str = "raise"):
        """nonfinite_grad: with "skip" a loss or gradient that is not finite is no part of the means, with "raise" it is the end."""
        self.stops = nonfinite_grad == "raise"
        # Adam's arithmetic is float32 anyway; mps has no float64
        dtype = torch.float32 if device.type == "mps" else torch.float64
        self.sums = torch.zeros(2, TIME_BINS, device=device, dtype=dtype)  # loss and number of samples, by time bin
        self.grad_norm = torch.zeros(2, device=device, dtype=dtype)  # sum and number of steps
        self.first_bad_step = torch.full((), -1, device=device, dtype=torch.long)

    def add(self, step: int, loss: Tensor, t: Tensor) -> None:
        """Per-sample loss [b] at times t [b]."""
        bins = (t * TIME_BINS).long().clamp_(0, TIME_BINS - 1)
        finite = torch.isfinite(loss.detach())
        values = torch.stack([loss.detach(), torch.ones_like(loss)]).to(self.sums.dtype)
        self.sums.index_add_(1, bins, torch.where(finite, values, 0))
        self._note(step, finite.all())

    def add_grad_norm(self, step: int, norm: Tensor, taken: bool) -> None:
        """The norm of a step's gradient, and whether the step was taken: one that was skipped is no part of the mean."""
        if taken:
            finite = torch.isfinite(norm.detach())
            self.grad_norm += torch.stack([torch.where(finite, norm.detach(), 0), finite]).to(self.grad_norm.dtype)
            self._note(step, finite)

    def _note(self, step: int, finite: Tensor) -> None:
        if self.stops:
            bad = ~finite & (self.first_bad_step < 0)
            self.first_bad_step = torch.where(bad, step, self.first_bad_step)

    def check(self, accelerator: Accelerator, newest: str) -> None:
        """Raises UserError on every process where a loss, or the gradient of a step, since the last check was not finite."""
        worst = int(self.first_bad_step)
        if accelerator.num_processes > 1:
            steps = accelerator.gather(self.first_bad_step[None])
            worst = int(steps[steps >= 0].min()) if bool((steps >= 0).any()) else -1
        if worst >= 0:
            raise UserError(
                f"the loss of step {worst} is not finite, or its gradient; {newest}. A smaller optimizer.lr, "
                "train.mixed_precision=bf16 instead of fp16, or train.nonfinite_grad=skip may help"
            )

    def state(self, accelerator: Accelerator) -> dict:
        """The sums over all processes, for a checkpoint between two readings."""
        return {"sums": accelerator.reduce(self.sums, "sum").tolist(), "grad_norm": self.grad_norm.tolist()}

    def load_state(self, accelerator: Accelerator, state: dict) -> None:
        if accelerator.is_main_process:
            self.sums += torch.tensor(state["sums"], device=self.sums.device, dtype=self.sums.dtype)
        self.grad_norm += torch.tensor(state["grad_norm"], device=self.sums.device, dtype=self.sums.dtype)

    def read(self, accelerator: Accelerator) -> dict[str, float]:
        """loss, its mean in each time bin that had samples, gradient norm; resets."""
        loss, count = accelerator.reduce(self.sums, "sum").tolist()
        norm, steps = self.grad_norm.tolist()
        self.sums.zero_()
        self.grad_norm.zero_()
        bins = {f"loss_t_{i / TIME_BINS:.1f}": loss[i] / count[i] for i in range(TIME_BINS) if count[i]}
        return {"loss": sum(loss) / sum(count) if sum(count) else float("nan"), **bins, "grad_norm": norm / max(steps, 1)}


class Throughput:
    """Images per second of training since the last reading; pauses do not count."""

    def __init__(self, batch_size: int, step: int):
        self.batch_size, self.step, self.start = batch_size, step, time.perf_counter()

    def read(self, step: int) -> float:
        seconds, steps = time.perf_counter() - self.start, step - self.step
        self.step, self.start = step, time.perf_counter()
        return steps * self.batch_size / seconds

    @contextmanager
    def paused(self) -> Iterator[None]:
        begun = time.perf_counter()
        yield
        self.start += time.perf_counter() - begun


def _to_scalar(value: object) -> int | float | str | bool:
    return value if isinstance(value, int | float | str | bool) else str(value)
