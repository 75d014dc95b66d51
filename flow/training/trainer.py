"""The training loop: one for flows, reflow, distillation and autoencoders. What differs between them is the `Task`."""

import sys
import time
from collections.abc import Callable, Generator, Sequence
from contextlib import AbstractContextManager, closing, nullcontext
from pathlib import Path
from typing import Any, NoReturn

import torch
from accelerate import Accelerator
from torch import Tensor

from configs.errors import UserError
from flow.losses import Batch, Losses
from flow.noise import generator
from flow.runtime import distributed, messages, step_names
from flow.runtime.shutdown import StopSignal
from flow.sampling import images, posthoc_ema
from flow.training import checkpoint, cuda_graph, run_dir, trackers
from flow.training.averages import RunAverages
from flow.training.cuda_graph import GraphedUpdate, Update
from flow.training.data_loader import prefetch
from flow.training.eager import EagerNetwork
from flow.training.ema import Ema
from flow.training.logging import Logger, log_summary, print_row, show_beside_bar
from flow.training.optimizer import StepGuard, build_optimizer, lr_at, set_options
from flow.training.statistics import LossStatistics, Throughput
from flow.training.task import Task


class Callback:
    """Hooks of the training loop; a subclass overrides what it needs. Every process calls them."""

    checkpoint_every_steps = 0  # the trainer also writes a checkpoint at multiples of this number

    def on_start(self, trainer: "Trainer") -> None:
        """Before the first step of this process."""

    def on_step(self, trainer: "Trainer") -> None:
        """After each optimizer step; `trainer.step` counts it."""

    def on_log(self, trainer: "Trainer", metrics: dict[str, float]) -> None:
        """After a row of metrics was written."""

    def on_checkpoint(self, trainer: "Trainer", path: Path) -> None:
        """After a checkpoint and its snapshots were written; a resumed run calls it again with the checkpoint it starts from,
        because a kill may have come in between."""

    def on_preview(self, trainer: "Trainer", picture: Tensor | None) -> None:
        """After a preview; the picture uint8 [C, H, W] on the main process, None on the others and where sampling failed."""


class Trainer:
    """Trains the network of a task from step 0, or from a checkpoint.

    Example:
        >>> task = FlowTask(config, accelerator)
        >>> Trainer(task, config, Path("runs/mnist"), accelerator).fit()
    """

    def __init__(
        self,
        task: Task,
        config: Any,
        folder: Path,
        accelerator: Accelerator,
        resume_path: Path | None = None,
        callbacks: Sequence[Callback] = (),
        timed: Callable[[str], AbstractContextManager] = nullcontext,
    ):
        """config: a `Config` or `VaeConfig`. folder: the run folder. resume_path: the checkpoint to resume from.
        timed: `timed("forward")` surrounds that part of a step, for benchmarks.

        Raises:
            UserError: where the checkpoint does not fit, or is past the last step.
        """
        self.task, self.config, self.folder, self.accelerator = task, config, folder, accelerator
        self.callbacks, self.timed = callbacks, timed
        self.step, self.num_updates = 0, 0  # updates: the steps that were not skipped
        self.last_checkpoint: Path | None = None
        self.stop_requested = False
        self.interrupted = False  # by a signal: the step is the last one of this process
        device = accelerator.device
        distributed.prepare_model(task.net, accelerator, config.train.compile)
        self.model, self.optimizer = accelerator.prepare(task.net, build_optimizer(task.net, config.optimizer, accelerator))
        sharded = accelerator.is_fsdp2
        if sharded:
            distributed.autocast_forward(self.model, accelerator)
        reason = "a derivative needs float32, in which FSDP2 has no sharded network"
        self.eager = EagerNetwork(
            task.net, derivative_error=reason if sharded else None, sharded=self.model if sharded else None
        )
        if self.eager.derivative_error and getattr(task.loss, "needs_derivative", False):
            raise UserError(f"loss.name={config.loss.name}: {self.eager.derivative_error}; use loss.name=alpha_flow")
        self.averages = RunAverages(task, config, folder, accelerator)
        self.statistics = LossStatistics(device, config.train.nonfinite_grad)
        self.guard = StepGuard(accelerator, config.train.nonfinite_grad)
        self.learning_rate = 0.0
        self.graphed = cuda_graph.is_possible(accelerator, config.train, task.loss)
        self.update: Update = GraphedUpdate(self._update) if self.graphed else self._update
        if resume_path:
            self._load_checkpoint(resume_path)
        self._prepare_folder()
        self.logger = Logger(accelerator, folder, config, first_step=self.step)
        self.throughput = Throughput(config.train.batch_size, self.step)

    def _prepare_folder(self) -> None:
        """Describe the run in its folder, and clear it of what a run that is resumed has left past its step. Rows of its
        evaluation stay: they name the content of their weights."""
        if self.accelerator.is_main_process:
            run_dir.write_run_files(self.folder, self.config, self.accelerator)
            posthoc_ema.rewind(self.folder, self.step)
            if moved := run_dir.set_aside(self.folder, self.step):
                where = moved[0].parent.parent
                what = f"{len(moved)} checkpoints, snapshots and previews past step {self.step}"
                self.accelerator.print(f"note: {what} are in {where} now")
        self.accelerator.wait_for_everyone()

    @property
    def ema(self) -> Ema:
        """The averages of previews and snapshots."""
        return self.averages.ema

    @property
    def finished(self) -> bool:
        return self.step == self.config.train.steps

    def is_due(self, every_steps: int) -> bool:
        """Whether the step is a multiple of this number; never of 0."""
        return bool(every_steps) and self.step % every_steps == 0

    def stop(self) -> None:
        """End `fit` after the current step, with a checkpoint; for callbacks, which all processes must agree on."""
        self.stop_requested = True

    def fit(self) -> None:
        """Train to the last step. SIGTERM, Ctrl-C and a closed terminal or pipe end the process after the step, with a
        checkpoint."""
        config, unit, start = self.config.train, self.task.unit, time.perf_counter()
        log_summary(self.logger, self.task.summary(), unit, config, self.step, self.graphed)
        self.model.train()
        batches, terminal = self._batches(), sys.stderr.isatty()
        bar = distributed.progress(self.accelerator, config.steps, "training", self.step, shown=terminal)
        with self.logger.recording_errors(), StopSignal() as stop, bar, closing(batches):
            self._start()
            if self.stop_requested and not self.last_checkpoint:
                self.save_checkpoint()
            while not self._ends():
                with self.timed("data"):
                    micro_batches = next(batches)
                self.training_step(micro_batches)
                bar.update()
                if self.finished or self.is_due(config.log_every_steps):
                    metrics = self.log()
                    if terminal:
                        show_beside_bar(bar, metrics, unit)
                    else:
                        print_row(self.accelerator, self.step, config, metrics, unit)
                signaled = distributed.any_process(self.accelerator, stop.received is not None)
                self.interrupted = signaled and not self.finished  # nothing is left to stop after the last step
                with self.throughput.paused():
                    self._write_what_is_due()
        if self.interrupted:
            self._leave(stop)
        result = f"{self.folder}: {'finished' if self.finished else 'stopped at'} step {self.step}"
        self.logger.info(messages.summary(result, start, self.task.next_command(self.folder)))

    def training_step(self, micro_batches: list[Batch]) -> None:
        """Forward and backward of the micro-batches, one optimizer step, the moving averages."""
        config = self.config
        self._seed_dropout()
        self.learning_rate = lr_at(config.optimizer, self.num_updates, config.train.steps)
        with self.timed("graph") if self.graphed else nullcontext():
            losses, grad_norm, updated = self.update(micro_batches, self.learning_rate)
        self.step += 1
        for part in losses:
            self.statistics.update(self.step, part)
        self.statistics.add_grad_norm(self.step, grad_norm, updated)
        if updated:
            self.num_updates += 1
            with self.timed("ema"):
                self.averages.update(self.step, self.num_updates)
        for callback in self.callbacks:
            callback.on_step(self)

    def _update(self, micro_batches: list[Batch], lr: float | Tensor) -> tuple[list[Losses], Tensor, bool]:
        """Forward and backward of the micro-batches and one optimizer step: the losses, the norm of the gradient, and whether
        the weights changed."""
        losses, timed = [], nullcontext if self.graphed else self.timed
        for batch in micro_batches:
            if not self.task.loss.capturable:  # the others do not call eager
                self.eager.start_micro_batch()
            last = batch is micro_batches[-1]
            with nullcontext() if last else self.accelerator.no_sync(self.model):
                with timed("forward"):
                    losses.append(self.task.loss(self.model, self.eager, batch))
                with timed("backward"):
                    self.accelerator.backward(losses[-1].per_sample.mean() / len(micro_batches))
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        with timed("optimizer"):
            return losses, *self.guard.update(self.model, self.optimizer, self.config.optimizer.clip_grad_norm)

    def log(self) -> dict[str, float]:
        """Write the means since the last call to metrics.jsonl and the trackers.

        Raises:
            UserError: where a loss or gradient was not finite (train.nonfinite_grad).
        """
        self.statistics.check(self.accelerator, self._checkpoint_hint())
        self.guard.check(self.step, self._checkpoint_hint())
        metrics = self.statistics.compute(self.accelerator)
        metrics |= {"skipped_steps": self.step - self.num_updates} | self.guard.metrics()
        metrics["learning_rate"] = self.learning_rate
        metrics["images"] = self.step * self.config.train.batch_size
        metrics["images_per_second"] = self.throughput.read(self.step)
        self.logger.log(self.step, metrics)
        for callback in self.callbacks:
            callback.on_log(self, metrics)
        return metrics

    def save_checkpoint(self) -> Path:
        """Write a checkpoint with its snapshots, and delete the oldest ones."""
        self.statistics.check(self.accelerator, self._checkpoint_hint())
        state = {
            "updates": self.num_updates, "samples": len(self.task.data), "statistics": self.statistics.state(self.accelerator)
        }  # fmt: skip
        write_averages = self.averages.gather(self.step, self.num_updates, self._checkpoint_hint())
        checkpoints = self.folder / "checkpoints"
        self.last_checkpoint = checkpoint.save(self.accelerator, checkpoints, self.step, state, write_averages)
        self._follow_checkpoint(self.last_checkpoint)
        return self.last_checkpoint

    def write_preview(self) -> None:
        """Write samples/step_XXXXXXXX.png from the averaged weights, and send it to the trackers."""
        with self.ema.average_parameters() as averaged:
            picture, metrics = self.task.preview(averaged, self.step)
        if picture is not None:
            self._preview_path().parent.mkdir(exist_ok=True)
            images.write_png(self._preview_path(), picture)
            trackers.log_image(self.accelerator, "samples", self.step, picture)
        for name, value in metrics.items():
            self.logger.info(f"step {self.step}: {name} {value:.2f}")
        for callback in self.callbacks:
            callback.on_preview(self, picture)

    def _batches(self) -> Generator[list[Batch], None, None]:
        """The micro-batches of each step."""
        # A GPU computes one step while the CPU draws the noise of the next; a CPU that computes has no time to spare, and two
        # threads that use mps at once end the process (github.com/pytorch/pytorch/issues/197805).
        return prefetch(self.task.batches(self.step), depth=0 if self.accelerator.device.type in ("cpu", "mps") else 1)

    def _start(self) -> None:
        """Start the callbacks, and write what a kill has left out after the checkpoint that the run resumes from."""
        for callback in self.callbacks:
            callback.on_start(self)
        if self.last_checkpoint:
            if self.finished:
                self._store_power_averages_if_due()
            self._follow_checkpoint(self.last_checkpoint)
            if self._preview_is_missing():
                self.write_preview()
        self.throughput = Throughput(self.config.train.batch_size, self.step)

    def _ends(self) -> bool:
        """Whether the step is the last one of this process."""
        return self.finished or self.interrupted or self.stop_requested

    def _write_what_is_due(self) -> None:
        """Power averages, checkpoint and preview of the step."""
        saves = self._ends() or self._checkpoint_is_due()
        self._store_power_averages_if_due()  # before the checkpoint, which says that they are there
        if saves:
            self.save_checkpoint()
        if self._preview_is_due():
            self.write_preview()
        if self.stop_requested and not saves:  # a callback has seen the preview
            self.save_checkpoint()

    def _store_power_averages_if_due(self) -> None:
        if self.averages.power_averages_are_due(self.step, self.num_updates):
            self.averages.store_power_averages(self.step, self.num_updates, self._checkpoint_hint())

    def _leave(self, stop: StopSignal) -> NoReturn:
        """End the process that a signal has stopped."""
        self.accelerator.end_training()
        command = run_dir.resume_command(self.folder, self.task.script, self.config)
        stop.leave(self.logger.info, f"{self._checkpoint_hint()}; resume with: {command}")

    def _load_checkpoint(self, path: Path) -> None:
        with checkpoint.reading(path):
            state = checkpoint.load(self.accelerator, path)
            self.step, self.num_updates, self.last_checkpoint = state["step"], state["updates"], path
            self.statistics.load_state(self.accelerator, state["statistics"])
            self.averages.load(path)
        before, now = state.get("samples"), len(self.task.data)  # checkpoints of earlier versions do not know it
        if before not in (None, now):
            self.accelerator.print(
                f"note: the data set had {before:,} samples at the checkpoint and has {now:,} now: they come in another order"
            )
        if self.step > self.config.train.steps:
            raise UserError(f"train.steps={self.config.train.steps}: the run is at step {self.step} already")
        set_options(self.optimizer, self.config.optimizer, self.accelerator)

    def _follow_checkpoint(self, saved: Path) -> None:
        """What a checkpoint is followed by: its snapshots, the work of the callbacks, and that older ones are deleted."""
        self.averages.link_snapshots(saved, self.step)
        for callback in self.callbacks:
            callback.on_checkpoint(self, saved)
        if self.accelerator.is_main_process:
            checkpoint.prune(self.folder / "checkpoints", self.config.train.keep_checkpoints)

    def _seed_dropout(self) -> None:
        key = ("dropout", self.config.seed, self.step, self.accelerator.process_index)
        torch.manual_seed(int(generator(*key).integers(2**63)))

    def _preview_path(self) -> Path:
        return self.folder / "samples" / step_names.name_of(self.step, ".png")

    def _checkpoint_is_due(self) -> bool:
        every = [self.config.train.checkpoint_every_steps, *(callback.checkpoint_every_steps for callback in self.callbacks)]
        return any(map(self.is_due, every))

    def _preview_is_due(self) -> bool:
        return self.finished or self.is_due(self.config.train.sample_every_steps)

    def _preview_is_missing(self) -> bool:
        """Whether a run that resumes here has left no preview of this step, though it was due; the same on all processes."""
        missing = self._preview_is_due() and not self._preview_path().exists()
        return distributed.any_process(self.accelerator, self.accelerator.is_main_process and missing)

    def _checkpoint_hint(self) -> str:
        return checkpoint.checkpoint_hint(self.last_checkpoint)
