"""The processes of a run: the accelerator, the threads, one-line errors, data sets fetched by one process."""

import functools
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator, DistributedDataParallelKwargs, InitProcessGroupKwargs
from tqdm import tqdm

from configs.schema import UserError
from flow.engine import sharding


def start(
    mixed_precision: str = "no", log_with: list[str] | None = None, log_dir: str | None = None, timeout_minutes: int = 30
) -> Accelerator:
    """The one place where the Accelerator is made.

    Raises UserError where the launcher started another number of processes than it was asked for, and for a precision
    that the device does not have.
    """
    _check_launch()
    found = torch.accelerator.is_available() and os.environ.get("ACCELERATE_USE_CPU", "").lower() != "true"
    if mixed_precision == "fp16" and not found:
        raise UserError("train.mixed_precision=fp16: needs a GPU; on a CPU use bf16 or no")
    timeout = timedelta(minutes=timeout_minutes)
    sharding.prepare_launch(found, timeout)
    # Without cpu=True, two processes on a machine without GPUs would each believe to be process 0 of 1.
    try:
        accelerator = Accelerator(
            cpu=not found,
            mixed_precision=mixed_precision,
            log_with=log_with or None,
            project_dir=log_dir,
            kwargs_handlers=[
                InitProcessGroupKwargs(timeout=timeout),
                DistributedDataParallelKwargs(gradient_as_bucket_view=True),
            ],
        )
    except ValueError as error:  # e.g. bf16 on a GPU that has none
        raise UserError(f"train.mixed_precision={mixed_precision}, train.log_with={log_with}: {error}") from None
    expected = int(os.environ.get("WORLD_SIZE", "1"))
    if accelerator.num_processes != expected:
        raise UserError(
            f"WORLD_SIZE={expected}, but {accelerator.num_processes} process(es) joined; start with "
            "`accelerate-launch --multi_gpu --num_processes N` or `torchrun --nproc_per_node N`"
        )
    launcher = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if launcher not in ("no", mixed_precision):
        accelerator.print(f"note: the launcher's mixed precision {launcher} is not used; pass -mp {launcher} to the script")
    return accelerator


def start_alone(script: str) -> Accelerator:
    """The accelerator of a script that works on one process; raises UserError where there are several."""
    accelerator = start()
    if accelerator.num_processes > 1:
        raise UserError(f"{script}: works on one process, not on {accelerator.num_processes}; start it with python -m")
    return accelerator


def set_threads() -> str | None:
    """Use all cores where a launcher left one thread a process; returns a line that says so, or None.

    `accelerate-launch` and `torchrun` set OMP_NUM_THREADS=1 where the user did not, which halves a CPU run on two cores.
    FLOW_NUM_THREADS overrides.
    """
    asked = os.environ.get("FLOW_NUM_THREADS")
    if asked is not None:
        if not asked.isdigit() or int(asked) < 1:
            raise UserError(f"FLOW_NUM_THREADS={asked}: must be a whole number of at least 1")
        torch.set_num_threads(int(asked))
        return None
    launched = "ACCELERATE_MIXED_PRECISION" in os.environ or "LOCAL_WORLD_SIZE" in os.environ
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    threads = cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if not launched or os.environ.get("OMP_NUM_THREADS") != "1" or threads <= 1:
        return None
    torch.set_num_threads(threads)
    return f"threads: {threads} a process (the launcher had set OMP_NUM_THREADS=1; FLOW_NUM_THREADS overrides)"


def one_process_first(accelerator: Accelerator, make: Callable[[], Any]) -> Any:
    """make() on the main process, then on one process of each machine, then on all others: only one downloads."""
    turn = 0 if accelerator.is_main_process else 1 if accelerator.is_local_main_process else 2
    result = None
    for now in range(3):
        if now == turn:
            result = make()
        accelerator.wait_for_everyone()
    return result


def progress(accelerator: Accelerator, total: int, what: str, initial: int = 0) -> tqdm:
    """The bar of a long job, with the time left, on the main process; a line every ten seconds where it goes to a file."""
    calm = 0.1 if sys.stderr.isatty() else 10.0
    return tqdm(
        total=total, initial=initial, desc=what, mininterval=calm, dynamic_ncols=True, disable=not accelerator.is_main_process
    )


def agree(accelerator: Accelerator, flag: bool) -> bool:
    """True on every process where any of them says True; the device is not waited for."""
    if accelerator.num_processes == 1:
        return flag
    value = torch.tensor([int(flag)])
    dist.all_reduce(value, group=_control_group())
    return bool(value.item())


def gather_to_main(accelerator: Accelerator, mine: Any) -> list | None:
    """The objects of all processes, by rank, on the main process; None on the others."""
    if accelerator.num_processes == 1:
        return [mine]
    gathered = [None] * accelerator.num_processes if accelerator.is_main_process else None
    dist.gather_object(mine, gathered, group=_control_group())
    return gathered


@functools.cache
def _control_group():
    """Processes talk about flags and objects over the CPU, whatever carries the gradients."""
    return dist.new_group(backend="gloo", timeout=dist.distributed_c10d._get_default_timeout("gloo"))


@contextmanager
def blame(key: str) -> Iterator[None]:
    """ValueErrors of a library call become errors of the user that name the configuration key."""
    try:
        yield
    except UserError:
        raise
    except (ValueError, FileNotFoundError) as error:
        raise UserError(f"{key}: {(str(error).splitlines() or [''])[0]}") from error


def run(main: Callable[[], None]) -> None:
    """Call an entry script's main: a user's mistake is one line on stderr and exit code 2, Ctrl-C leaves with 130.

    FLOW_TRACEBACK=1 shows the traceback of such an error as well.
    """
    try:
        main()
        status = 0
    except (UserError, OSError) as error:
        if os.environ.get("FLOW_TRACEBACK"):
            raise
        rank = int(os.environ.get("RANK", "0"))
        if rank:
            time.sleep(2)  # what all processes find wrong is said once: the launcher ends the others when rank 0 leaves
        print(f"{f'[process {rank}] ' if rank else ''}error: {error}", file=sys.stderr, flush=True)
        status = 2
    except KeyboardInterrupt:
        status = 130
    if dist.is_available() and dist.is_initialized() and status == 0:
        dist.destroy_process_group()
    sys.exit(status)


def _check_launch() -> None:
    """`accelerate-launch --cpu --num_processes 2` starts one process without a word; its mark is a rendezvous address
    for a process that belongs to no group."""
    lone = "MASTER_ADDR" in os.environ and "WORLD_SIZE" not in os.environ
    if lone and os.environ.get("ACCELERATE_USE_CPU", "").lower() == "true" and "PMI_SIZE" not in os.environ:
        raise UserError(
            "the launcher started one process where several were asked for (--cpu --num_processes N does that); use "
            "`accelerate-launch --multi_gpu --num_processes N`, which on a machine without GPUs runs on the CPU, "
            "or `torchrun --nproc_per_node N`"
        )
