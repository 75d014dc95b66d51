"""A few real steps of train.py in a temporary folder, with clocks around what it calls; used by scripts/doctor/."""

import contextlib
import io
import resource
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list

import train
from configs.schema import UserError
from flow.sampling import snapshot
from flow.training import checkpoint
from flow.training.data_loader import TrainingLoader

STEPS = 5  # that are measured; one before them is not, as it allocates and compiles


@dataclass
class Trial:
    """What was measured, of one process."""

    first: float  # seconds of the step before the measured ones
    seconds_per_step: float  # median
    checkpoint_seconds: float
    preview_seconds: float
    checkpoint_bytes: int
    snapshot_bytes: int  # the moving averages of one checkpoint
    peak_bytes: int


def try_training(config: str | None, overrides: list[str], accelerator: Accelerator) -> Trial:
    """Train so few steps, write a checkpoint and a preview. Raises UserError where training cannot begin or go on."""
    with tempfile.TemporaryDirectory() as scratch:
        shared = [scratch]
        broadcast_object_list(shared)  # one folder for all processes
        run = Path(shared[0]) / "run"
        laps, seconds = [], {"checkpoint": 0.0, "preview": 0.0}
        steps = TrainingLoader.steps

        def timed_steps(loader, first: int, last: int):
            since = time.perf_counter()
            for step, batch in enumerate(steps(loader, first, last)):
                yield batch
                if step < STEPS:  # the last one is followed by checkpoint and preview
                    _wait()
                    laps.append(time.perf_counter() - since)
                    since = time.perf_counter()

        def timed(kind: str, function):
            def call(*args, **kwargs):
                started = time.perf_counter()
                result = function(*args, **kwargs)
                _wait()
                seconds[kind] += time.perf_counter() - started
                return result

            return call

        options = [
            f"train.steps={STEPS + 1}",
            "train.log_with=[]",
            "train.checkpoint_every_steps=0",
            "train.sample_every_steps=0",
        ]
        argv = ["train.py", *(["-c", config] if config else []), "-e", str(run), *overrides, *options]
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        with (
            contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()),
            mock.patch.object(sys, "argv", argv), mock.patch.object(TrainingLoader, "steps", timed_steps),
            mock.patch.object(checkpoint, "save", timed("checkpoint", checkpoint.save)),
            mock.patch.object(Accelerator, "end_training"),  # which would end the group of processes
            mock.patch.object(train, "write_preview", timed("preview", train.write_preview)),
        ):  # fmt: skip
            _run(accelerator)
        saved = checkpoint.list_checkpoints(run / "checkpoints")[-1]
        averages = [p for p in saved.iterdir() if p.name.startswith("ema")]
        found = Trial(
            laps[0], statistics.median(laps[1:]), seconds["checkpoint"], seconds["preview"],
            sum(p.stat().st_size for p in saved.iterdir()), sum(p.stat().st_size for p in averages), _peak(),
        )  # fmt: skip
        snapshot.find(run)
        accelerator.wait_for_everyone()  # before the folder goes
    return found


def _run(accelerator: Accelerator) -> None:
    try:
        train.main()
    except torch.OutOfMemoryError:
        raise UserError("the batch does not fit into the memory of the GPU; double train.gradient_accumulation_steps") from None
    except MemoryError:
        raise UserError("the batch does not fit into memory; double train.gradient_accumulation_steps") from None
    except RuntimeError as error:
        raise UserError(f"train.py stopped: {(str(error).splitlines() or [type(error).__name__])[0]}") from None
    accelerator.wait_for_everyone()


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _peak() -> int:
    """Bytes that this process held at most."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
