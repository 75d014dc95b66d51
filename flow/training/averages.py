"""The moving averages of a run: how they move, and their files in its folder."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from torch import Tensor

from configs import schema
from configs.errors import UserError
from flow.sampling import posthoc_ema, snapshot
from flow.sampling.header import PowerAverage
from flow.training import checkpoint
from flow.training.ema import Averages, Ema, PowerEma
from flow.training.task import Task


class RunAverages:
    """The averages that a configuration asks for: `ema`, of which the first half-life is that of previews, and `power_ema`.

    Every process calls the methods. updates: the steps that were not skipped. hint: the end of an error, about the latest
    checkpoint.
    """

    def __init__(self, task: Task, config: Any, folder: Path, accelerator: Accelerator):
        """All averages start from the weights of now. folder: of the run."""
        self.task, self.config, self.folder, self.accelerator = task, config, folder, accelerator
        self.half_lives = schema.half_lives(config)
        self.ema = Ema(task.net, self.half_lives, config.ema.warmup_ratio, task.build_network)
        self.power_ema = PowerEma(task.net, schema.power_widths(config), task.build_network)

    def update(self, updates: int) -> None:
        """Call after an optimizer step that was not skipped."""
        batch_size = self.config.train.batch_size
        self.ema.update(batch_size, updates * batch_size)
        self.power_ema.update(updates)

    def writer(self, step: int, updates: int, hint: str) -> Callable[[Path], None]:
        """A function that writes all averages, as they are now, into a checkpoint, to be called on the main process; every
        process asks for it, as sharded averages are gathered.

        Raises:
            UserError: where a number in them is not finite.
        """
        averages, power_averages = self._gather(self.ema, step, hint), self._gather(self.power_ema, step, hint)

        def write(path: Path) -> None:
            for weights, half_life, name in zip(averages, self.half_lives, checkpoint.ema_files(self.half_lives), strict=True):
                self.task.write_snapshot(path / name, weights, step, half_life)
            widths = self.power_ema.widths
            for weights, width, name in zip(power_averages, widths, checkpoint.power_files(widths), strict=True):
                self.task.write_snapshot(path / name, weights, step, 0, PowerAverage(width, updates))

        return write

    def load(self, path: Path) -> None:
        """Go on from the averages in a checkpoint."""
        for i, name in enumerate(checkpoint.ema_files(self.half_lives)):
            self.ema.load_state_dict(i, self.task.read_snapshot(path / name))
        for i, name in enumerate(checkpoint.power_files(self.power_ema.widths)):
            self.power_ema.load_state_dict(i, self.task.read_snapshot(path / name))

    def link_snapshots(self, saved: Path, step: int) -> None:
        """Give the averages in the checkpoint `saved` a second name in snapshots/."""
        if self.accelerator.is_main_process:
            keep = self.config.train.keep_snapshots
            checkpoint.link_ema_snapshots(saved, self.folder / "snapshots", step, self.half_lives, keep)

    def power_averages_are_due(self, step: int, updates: int) -> bool:
        """Whether the power averages of this step are to be stored."""
        if not self.power_ema.widths or not updates:
            return False
        every_steps = self.config.ema.power_every_steps
        return step == self.config.train.steps or bool(every_steps and step % every_steps == 0)

    def store_power_averages(self, step: int, updates: int, hint: str) -> None:
        """Write power_averages/width_*/step_XXXXXXXX.safetensors, which averages of other widths are made of later.

        Raises:
            UserError: where a number in them is not finite.
        """
        for weights, width in zip(self._gather(self.power_ema, step, hint), self.power_ema.widths, strict=True):
            if self.accelerator.is_main_process:
                path = posthoc_ema.stored_path(self.folder, width, step)
                self.task.write_snapshot(path, weights, step, 0, PowerAverage(width, updates))

    def _gather(self, averages: Averages, step: int, hint: str) -> list[dict[str, Tensor]]:
        """State dicts of all averages, gathered by all processes where they are sharded; empty on all but the main process."""
        states = []
        for i in range(len(averages.shadow)):
            state = averages.state_dict(i)
            if name := snapshot.first_nonfinite(state):
                raise UserError(
                    f"the average of {name} is not finite after step {step}; {hint}. A smaller optimizer.lr may help"
                )
            states.append(state if self.accelerator.is_main_process else {})  # which writes them
        return states
