"""Errors of a user are one line and exit code 2."""

import os
import re
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist

from configs.schema import UserError

_CONNECTION = re.compile(r"timed out|timeout|connection (closed|reset)|broken pipe|socket|gloo|nccl", re.IGNORECASE)


@contextmanager
def error_context(key: str) -> Iterator[None]:
    """ValueErrors of a library call become errors of the user that name the configuration key."""
    try:
        yield
    except UserError:
        raise
    except (ValueError, FileNotFoundError) as error:
        raise UserError(f"{key}: {(str(error).splitlines() or [''])[0]}") from error


def cli_main(main: Callable[[], None]) -> None:
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
            time.sleep(2)  # an error of all processes is printed once: the launcher ends the others when rank 0 leaves
        print(f"{who}error: {_one_line(error)}", file=sys.stderr, flush=True)
        status = 2
    except (MemoryError, torch.OutOfMemoryError):
        if os.environ.get("FLOW_TRACEBACK"):
            raise
        print(
            f"{who}error: out of memory; use a smaller batch, or for training more of train.gradient_accumulation_steps",
            file=sys.stderr,
        )
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
    if dist.is_available() and dist.is_initialized():
        if status == 0:
            dist.destroy_process_group()
        else:  # leaving in order sometimes aborts in the threads of gloo, and the launcher would report that signal
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)
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
    message = "another process has ended, hangs or cannot be reached (train.timeout_minutes)"
    return f"{message}: {reason}; resume a training with -r latest"
