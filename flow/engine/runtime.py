"""The processes of a run: the accelerator, the threads, one-line errors, data sets fetched by one process."""

import ctypes
import functools
import os
import re
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator, DistributedDataParallelKwargs, InitProcessGroupKwargs
from accelerate.utils import DDPCommunicationHookType
from torch import nn
from tqdm import tqdm

from configs.schema import TrainConfig, UserError
from flow.engine import sharding

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # of malloc.h
_CONNECTION = re.compile(r"timed out|timeout|connection (closed|reset)|broken pipe|socket|gloo|nccl", re.IGNORECASE)


def start(
    mixed_precision: str = "no",
    log_with: list[str] | None = None,
    log_dir: str | None = None,
    timeout_minutes: float = 30,
    gradient_compression: str = "no",
) -> Accelerator:
    """The one place where the Accelerator is made; threads and memory of the process are set here too.

    Raises UserError where the launcher started another number of processes than it was asked for, and for a precision
    that the device does not have.
    """
    _check_launch()
    thread_note = set_threads()
    keep_memory()
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
                DistributedDataParallelKwargs(
                    gradient_as_bucket_view=True, comm_hook=DDPCommunicationHookType(gradient_compression)
                ),
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
    if thread_note:
        accelerator.print(thread_note)
    return accelerator


def start_training(config: TrainConfig, log_dir: Path) -> Accelerator:
    """The accelerator of a trainer; its trackers write to `log_dir`."""
    return start(config.mixed_precision, config.log_with, str(log_dir), config.timeout_minutes, config.gradient_compression)


def send(x: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A CPU tensor on the device, without waiting for what the device is doing."""
    if device.type != "cuda":
        return x.to(device)
    with torch.cuda.device(device):  # in a thread of its own the first GPU would be the current one
        return x.pin_memory().to(device, non_blocking=True)


def place(net: nn.Module, accelerator: Accelerator, compiled: bool = False) -> None:
    """The network to the device, in the memory layout in which it is fastest there, and through torch.compile if asked.

    Pixels with their channels side by side are what the tensor cores of GPUs work on; on a CPU that is also faster in fp32,
    but slower in bf16, whose group norm loses more than the convolutions gain (docs/performance.md).
    """
    side_by_side = accelerator.device.type == "cuda" or accelerator.mixed_precision == "no"
    net.to(accelerator.device).to(memory_format=torch.channels_last if side_by_side else torch.contiguous_format)
    if compiled:
        net.compile()


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


def keep_memory() -> None:
    """Have glibc hold on to freed memory: it gives blocks above 32 MiB back to the system, and to fetch the activations of a
    large network page by page again in every step takes a tenth of the step (docs/performance.md)."""
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "mallopt"):
        libc.mallopt(M_MMAP_MAX, 0)
        libc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


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
    dist.all_reduce(value, group=_control_group(accelerator.init_handler.timeout))
    return bool(value.item())


def gather_to_main(accelerator: Accelerator, mine: Any) -> list | None:
    """The objects of all processes, by rank, on the main process; None on the others."""
    if accelerator.num_processes == 1:
        return [mine]
    gathered = [None] * accelerator.num_processes if accelerator.is_main_process else None
    dist.gather_object(mine, gathered, group=_control_group(accelerator.init_handler.timeout))
    return gathered


@functools.cache
def _control_group(timeout: timedelta):
    """Processes talk about flags and objects over the CPU, whatever carries the gradients."""
    return dist.new_group(backend="gloo", timeout=timeout)


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
    """Call an entry script's main: a user's mistake is one line on stderr and exit code 2, Ctrl-C leaves with 130, and a
    process that has lost another one says so and leaves with 1.

    FLOW_TRACEBACK=1 shows the traceback of such an error as well.
    """
    rank = int(os.environ.get("RANK", "0"))
    who = f"[process {rank}] " if rank else ""
    try:
        main()
        status = 0
    except (UserError, OSError) as error:
        if os.environ.get("FLOW_TRACEBACK"):
            raise
        if rank:
            time.sleep(2)  # what all processes find wrong is said once: the launcher ends the others when rank 0 leaves
        print(f"{who}error: {_one_line(error)}", file=sys.stderr, flush=True)
        status = 2
    except (MemoryError, torch.OutOfMemoryError):
        if os.environ.get("FLOW_TRACEBACK"):
            raise
        print(f"{who}error: out of memory; use a smaller batch, or for training more of train.accumulate", file=sys.stderr)
        status = 2
    except RuntimeError as error:
        if os.environ.get("FLOW_TRACEBACK") or not (_is_of_the_connection(error) or "DefaultCPUAllocator" in str(error)):
            raise
        if "DefaultCPUAllocator" in str(error):  # torch's MemoryError of a CPU
            print(f"{who}error: out of memory; use a smaller batch", file=sys.stderr, flush=True)
            sys.exit(2)
        print(f"{who}error: {_lost(error)}", file=sys.stderr, flush=True)
        sys.stdout.flush()
        os._exit(1)  # leaving in order would wait for the lost process
    except KeyboardInterrupt:
        status = 130
    if dist.is_available() and dist.is_initialized() and status == 0:
        dist.destroy_process_group()
    sys.exit(status)


def _one_line(error: Exception) -> str:
    """Its text with line breaks, and what else moves the cursor, spelt out: a value of the user may be part of it."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in str(error))


def _is_of_the_connection(error: RuntimeError) -> bool:
    """Whether an error says that other processes do not answer: torch's own kinds, and those of gloo, which have none."""
    if not dist.is_available() or not dist.is_initialized():
        return False
    return isinstance(error, dist.DistError) or _CONNECTION.search(str(error)) is not None


def _lost(error: RuntimeError) -> str:
    first = (str(error).splitlines() or [type(error).__name__])[0]
    reason = re.sub(r"^\[[^]]*\] ", "", first).partition(". This ")[0]  # without gloo's source line and advice
    told = "another process has ended, hangs or cannot be reached (train.timeout_minutes)"
    return f"{told}: {reason}; a training goes on with -r latest"


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
