"""A few real training steps in a temporary folder, timed by a callback of the Trainer."""

import contextlib
import io
import shutil
import statistics
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import Tensor
from tqdm import tqdm

from configs import loading
from configs.errors import UserError, first_line
from flow.runtime import distributed, files
from flow.training import cuda_graph
from flow.training.flow_task import FlowTask
from flow.training.trainer import Callback, Trainer

STEPS = 5  # that are measured; the one before them is not, as it allocates and compiles, nor are those of `cuda_graph`


@dataclass
class Trial:
    """What was measured, of one process."""

    first: float  # seconds of the first step
    seconds_per_step: float  # median
    checkpoint_seconds: float
    preview_seconds: float
    checkpoint_bytes: int
    snapshot_bytes: int  # the moving averages of one checkpoint
    peak_bytes: int


class Clock(Callback):
    """Seconds of each step, of the checkpoint and of the preview that follow the last one; a bar shows the steps."""

    def __init__(self, bar: tqdm):
        self.bar = bar
        self.steps: list[float] = []
        self.checkpoint = self.preview = 0.0
        self.checkpoint_path = Path()
        self.last = time.perf_counter()

    def on_step(self, trainer: Trainer) -> None:
        self.steps.append(self._elapsed())
        self.bar.update()

    def on_checkpoint(self, trainer: Trainer, path: Path) -> None:
        self.checkpoint = self._elapsed()
        self.checkpoint_path = path

    def on_preview(self, trainer: Trainer, picture: Tensor | None) -> None:
        self.preview = self._elapsed()

    def _elapsed(self) -> float:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        now = time.perf_counter()
        self.last, seconds = now, now - self.last
        return seconds


def try_training(config: str | None, overrides: list[str], accelerator: Accelerator, parent: Path) -> Trial:
    """Train a few steps in a folder of its own in `parent`, on the disk of the run; write a checkpoint and a preview.

    Raises UserError where training cannot start or continue.
    """
    with tempfile.TemporaryDirectory(dir=parent, prefix=files.TEMPORARY, ignore_cleanup_errors=True) as scratch:
        shared = distributed.decided_by_main(lambda: scratch)  # one folder for all processes
        short = [
            f"train.steps={1 + STEPS}", "train.log_with=[]", "train.checkpoint_every_steps=0", "train.sample_every_steps=0",
        ]  # fmt: skip
        settings = loading.load(config, [*overrides, *short])
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        warmup = 1
        # The bar writes to the terminal, which is silent for the training itself.
        bar = distributed.progress(accelerator, 1 + STEPS, "trial (steps, then a checkpoint and a preview)")
        clock = Clock(bar)
        with bar, contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()), _one_line_errors():
            task = FlowTask(settings, accelerator)
            task.load_init_weights()
            if cuda_graph.obstacle(accelerator, settings.train, task.loss) is None:
                warmup = cuda_graph.EAGER_STEPS + 1  # the capture is the step after them
                settings.train.steps = bar.total = warmup + STEPS
            Trainer(task, settings, Path(shared) / "run", accelerator, callbacks=[clock]).fit()
        accelerator.wait_for_everyone()
        saved = distributed.decided_by_main(lambda: {p.name: p.stat().st_size for p in clock.checkpoint_path.iterdir()})
        trial = Trial(
            clock.steps[0], statistics.median(clock.steps[warmup:]), clock.checkpoint, clock.preview,
            sum(saved.values()), sum(size for name, size in saved.items() if name.startswith("ema")), distributed.peak_bytes(),
        )  # fmt: skip
        accelerator.wait_for_everyone()  # before the folder goes
        shutil.rmtree(shared, ignore_errors=True)  # on another machine it is one of its own
    return trial


@contextlib.contextmanager
def _one_line_errors():
    try:
        yield
    except torch.OutOfMemoryError:
        raise UserError("the batch does not fit into the memory of the GPU; double train.gradient_accumulation_steps") from None
    except MemoryError:
        raise UserError("the batch does not fit into memory; double train.gradient_accumulation_steps") from None
    except RuntimeError as error:
        raise UserError(f"training stopped: {first_line(error)}") from None
