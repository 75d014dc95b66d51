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
from torch.nn.parallel import DistributedDataParallel

from configs.errors import UserError
from flow.losses import Batch, Losses
from flow.noise import generator
from flow.runtime import distributed, messages, step_names
from flow.runtime.shutdown import StopSignal
from flow.sampling import images, posthoc_ema
from flow.training import checkpoint, cuda_graph, eager, run_dir, trackers
from flow.training.averages import RunAverages
from flow.training.cuda_graph import GraphedStep
from flow.training.data_loader import prefetch
from flow.training.ema import Ema
from flow.training.logging import Logger, log_summary, print_row, show_beside_bar
from flow.training.muon import MuonWithAdamW
from flow.training.optimizer import OptimizerStep, build_optimizer, lr_at, set_options, warmup_note
from flow.training.output_checks import check_losses
from flow.training.statistics import LossStatistics, Throughput
from flow.training.step import Step, StepOutput
from flow.training.task import Task


class Callback:
    """Hooks of the training loop; a subclass overrides what it needs. Every process calls them."""

    checkpoint_every_steps = 0  # the trainer also writes a checkpoint at multiples of this number

    def on_start(self, trainer: "Trainer") -> None:
        """Before the first step of this process."""

    def on_step(self, trainer: "Trainer") -> None:
        """After each optimizer step; `trainer.step` counts it."""

    def on_log(self, trainer: "Trainer", metrics: dict[str, float]) -> None:
        """After a row of metrics was written; without `loss` or `grad_norm` where none since the last row was finite."""

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
        self.step = 0
        self.num_updates = 0  # steps that were not skipped
        self.learning_rate = 0.0
        self.last_checkpoint: Path | None = None
        self.stop_requested = False
        self.interrupted = False  # by a signal: the step is the last one of this process
        self.loss_is_checked = False  # what it returns, in the first step of this process
        distributed.prepare_model(task.net, accelerator, config.train.compile)
        optimizer = build_optimizer(task.net, config.optimizer, accelerator)
        # The network as DDP or FSDP2 has it; task.net is the same without them.
        self.wrapped_net, self.optimizer = accelerator.prepare(task.net, optimizer)
        if isinstance(self.wrapped_net, DistributedDataParallel):
            # Buffers of the networks here are constants, which DDP would send from process 0 at each step.
            self.wrapped_net.broadcast_buffers = False
        self.eager = eager.build(task.net, self.wrapped_net, accelerator)
        if self.eager.derivative_error and getattr(task.loss, "needs_derivative", False):
            raise UserError(f"loss.name={config.loss.name}: {self.eager.derivative_error}; use loss.name=alpha_flow")
        self.optimizer_step = OptimizerStep(self.wrapped_net, self.optimizer, accelerator, config)
        self.graph_obstacle = cuda_graph.obstacle(accelerator, config.train, task.loss)
        self.graphed = self.graph_obstacle is None
        self.take_step: Step = GraphedStep(self.forward_backward_step) if self.graphed else self.forward_backward_step
        self.averages = RunAverages(task, config, folder, accelerator)
        self.statistics = LossStatistics(accelerator.device, config.train.nonfinite_grad)
        if resume_path:
            self._load_checkpoint(resume_path)
        self.throughput = Throughput(config.train.batch_size, self.step)

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
        config = self.config.train
        start = time.perf_counter()
        self._open_folder()
        self.wrapped_net.train()
        batches = self._batches()
        terminal = sys.stderr.isatty()
        bar = distributed.progress(self.accelerator, config.steps, "training", self.step, shown=terminal)
        notice = "the training stops when this step, checkpoint or preview is done"
        stopping = StopSignal(notice if self.accelerator.is_main_process else "")
        any_signal = distributed.AnyProcess(self.accelerator)  # of several processes, which stop a step after the signal
        with self.logger.recording_errors(), stopping as stop, bar, closing(batches):
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
                        show_beside_bar(bar, metrics, self.task.unit)
                    else:
                        print_row(self.accelerator, self.step, config, metrics, self.task.unit)
                signaled = any_signal(stop.received is not None)
                self.interrupted = signaled and not self.finished  # nothing is left to stop after the last step
                with self.throughput.paused():
                    self._write_what_is_due()
            self.interrupted |= any_signal.wait() and not self.finished  # one that came with a callback's stop
        if self.interrupted:
            self._leave(stop)
        result = f"{self.folder}: {'finished' if self.finished else 'stopped at'} step {self.step}"
        self.logger.info(messages.summary(result, start, self.task.next_command(self.folder)))

    def training_step(self, micro_batches: list[Batch]) -> None:
        """One step of the optimizer, then the statistics and the moving averages. Raises UserError where the run only skips."""
        self._seed_dropout()
        self.learning_rate = lr_at(self.config.optimizer, self.num_updates, self.config.train.steps)
        with self.timed("graph") if self.graphed else nullcontext():
            output = self.take_step(micro_batches, self.learning_rate)
        self.step += 1
        for losses in output.losses:
            self.statistics.update(self.step, losses)
        self.statistics.add_grad_norm(self.step, output.grad_norm, output.updated)
        if output.updated:
            self.num_updates += 1
            with self.timed("ema"):
                self.averages.update(self.num_updates)
        if self.optimizer_step.only_skips:
            self.statistics.check(self.accelerator, self._checkpoint_hint())  # which names the first step, if it is to raise
            self.optimizer_step.fail(self.step, self._checkpoint_hint())
        for callback in self.callbacks:
            callback.on_step(self)

    def forward_backward_step(self, micro_batches: list[Batch], lr: float | Tensor) -> StepOutput:
        """Forward and backward of each micro-batch, then one step of the optimizer with the mean of their gradients."""
        timed = nullcontext if self.graphed else self.timed
        losses = []
        for i, batch in enumerate(micro_batches):
            is_last = i == len(micro_batches) - 1
            with nullcontext() if is_last else self.accelerator.no_sync(self.wrapped_net):
                with timed("forward"):
                    losses.append(self.forward(batch))
                with timed("backward"):
                    self.accelerator.backward(losses[-1].per_sample.mean() / len(micro_batches))
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        with timed("optimizer"):
            grad_norm, updated = self.optimizer_step.clip_and_step()
        return StepOutput(losses, grad_norm, updated)

    def forward(self, batch: Batch) -> Losses:
        """The loss of a micro-batch."""
        if not self.graphed:  # a loss that can be captured does not call `eager`
            self.eager.start_micro_batch()
        losses = self.task.loss(self.wrapped_net, self.eager, batch)
        if not self.loss_is_checked:
            check_losses(self.task.loss, losses, len(batch.x1))
            self.loss_is_checked = True
        return losses

    def log(self) -> dict[str, float]:
        """Write the means since the last call to metrics.jsonl and the trackers.

        Raises:
            UserError: where a loss or gradient was not finite (train.nonfinite_grad=raise).
        """
        self.statistics.check(self.accelerator, self._checkpoint_hint())
        metrics = self.statistics.compute(self.accelerator)
        metrics |= {"skipped_steps": self.step - self.num_updates} | self.optimizer_step.metrics()
        metrics["learning_rate"] = self.learning_rate
        metrics["images"] = self.step * self.config.train.batch_size
        rate = self.throughput.read(self.step)
        metrics["images_per_second"] = distributed.decided_by_main(lambda: rate)  # callbacks of all processes see the same
        self.logger.log(self.step, metrics)
        for callback in self.callbacks:
            callback.on_log(self, metrics)
        return metrics

    def save_checkpoint(self) -> Path:
        """Write a checkpoint with its snapshots, and delete the oldest ones."""
        self.statistics.check(self.accelerator, self._checkpoint_hint())
        state = {
            "updates": self.num_updates, "samples": len(self.task.data), "sample_digest": self.task.sample_digest,
            "statistics": self.statistics.state(self.accelerator),
        }  # fmt: skip
        write_averages = self.averages.writer(self.step, self.num_updates, self._checkpoint_hint())
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

    def _open_folder(self) -> None:
        """Describe the run in its folder, set aside the files of later steps than that of a resumed run, and start the log.

        Rows of the evaluation stay, as they name the content of their weights.
        """
        if self.accelerator.is_main_process:
            run_dir.write_run_files(self.folder, self.config, self.accelerator)
            posthoc_ema.rewind(self.folder, self.step)
            if moved := run_dir.set_aside(self.folder, self.step):
                what = f"{len(moved)} checkpoints, snapshots and previews past step {self.step}"
                self.accelerator.print(f"note: {what} are in {moved[0].parent.parent} now")
        self.accelerator.wait_for_everyone()
        self.logger = Logger(self.accelerator, self.folder, self.config, first_step=self.step)
        config = self.config.train
        lines = self.task.summary()
        if isinstance(optimizer := self.optimizer.optimizer, MuonWithAdamW):
            lines.append(optimizer.summary())
        if note := warmup_note(self.config.optimizer, config.steps):
            lines.append(f"note: {note}")
        if config.cuda_graph and self.graph_obstacle and self.accelerator.device.type == "cuda":
            lines.append(f"note: train.cuda_graph=true changes nothing here: {self.graph_obstacle}")
        log_summary(self.logger, lines, self.task.unit, config, self.step, self.graphed)

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
            self.step = state["step"]
            self.num_updates = state["updates"]
            self.last_checkpoint = path
            self.statistics.load_state(self.accelerator, state["statistics"])
            self.averages.load(path)
        self._note_changed_data(state)
        if self.step > self.config.train.steps:
            raise UserError(f"train.steps={self.config.train.steps}: the run is at step {self.step} already")
        set_options(self.optimizer, self.config.optimizer, self.accelerator)

    def _note_changed_data(self, state: dict[str, Any]) -> None:
        """A note where the data set is not that of the checkpoint. Checkpoints of earlier versions know nothing of it."""
        before, now = state.get("samples"), len(self.task.data)
        if before not in (None, now):
            change = f"had {before:,} samples at the checkpoint and has {now:,} now: they come in another order"
        elif state.get("sample_digest") not in (None, self.task.sample_digest):
            change = "has other samples than at the checkpoint"
        else:
            return
        self.accelerator.print(f"note: the data set {change}")

    def _follow_checkpoint(self, saved: Path) -> None:
        """Link the snapshots of a checkpoint, run the callbacks, delete older checkpoints."""
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
