"""Errors of a user are one line and exit code 2."""

import atexit
import os
import re
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import TypeVar

from configs.errors import UserError, first_line
from flow.runtime.shutdown import flush_output, print_nowhere

Item = TypeVar("Item")
CONTINUES = "the same command continues"
# gloo's errors about other processes that do not answer have no kind of their own
_CONNECTION = re.compile(r"timed out|timeout|connection (closed|reset)|broken pipe|socket|gloo|nccl", re.IGNORECASE)


@contextmanager
def error_context(key: str) -> Iterator[None]:
    """ValueErrors of a library call become errors of the user that name the configuration key."""
    try:
        yield
    except UserError:
        raise
    except (ValueError, FileNotFoundError) as error:
        raise UserError(f"{key}: {first_line(error)}") from error


def items_in_context(key: str, items: Iterable[Item]) -> Iterator[Item]:
    """The items, each made within `error_context(key)`; what the caller does with them is not."""
    iterator = iter(items)
    while True:
        with error_context(key):
            try:
                item = next(iterator)
            except StopIteration:
                return
        yield item


@contextmanager
def renaming(flag: str, key: str) -> Iterator[None]:
    """Errors of the user that start with `flag` start with `key` instead: for code that reads such a value from a
    configuration key, as in renaming("--weights ", "train.init_from=")."""
    try:
        yield
    except UserError as error:
        if not str(error).startswith(flag):
            raise
        raise UserError(key + str(error).removeprefix(flag)) from error


def cli_main(main: Callable[[], None], interrupted: str = "") -> None:
    """Call an entry script's main: a user's mistake is one line on stderr and exit code 2, Ctrl-C leaves with 130, a closed
    pipe with 141, a process that has lost another one says so and leaves with 1; `sys.exit(status)` leaves with that status.

    interrupted: printed after Ctrl-C, e.g. CONTINUES. FLOW_TRACEBACK=1 shows the traceback of an error of the user as well.
    """
    rank = int(os.environ.get("RANK") or 0)
    try:
        main()
        status = 0
    except KeyboardInterrupt:
        status = 130
        if not rank:
            print(f"\ninterrupted{'; ' * bool(interrupted)}{interrupted}", file=sys.stderr, flush=True)
    except BrokenPipeError:  # nobody reads what is printed, as behind `| head`
        print_nowhere([1])
        status = 141
    except SystemExit as left:
        if not isinstance(left.code, int):
            raise
        status = left.code
    except Exception as error:
        message, status = _report(error)
        if not message or os.environ.get("FLOW_TRACEBACK"):
            raise
        if rank and isinstance(error, UserError | OSError):
            time.sleep(2)  # an error of all processes is printed once: the launcher ends the others when rank 0 leaves
        print(f"{f'[process {rank}] ' if rank else ''}error: {message}", file=sys.stderr, flush=True)
    group = _process_group()
    if group and status == 0:  # else this would wait for a lost process
        group.destroy_process_group()
    if group or int(os.environ.get("WORLD_SIZE", "1")) > 1:
        # Once in eight or ten times threads of gloo abort the interpreter while it takes itself down, with all work done, and
        # the launcher would report that signal: leave as the children of `multiprocessing` do.
        if status == 0:
            atexit._run_exitfuncs()
        flush_output()
        os._exit(status)
    flush_output()
    sys.exit(status)


def printable(text: str) -> str:
    """A line for the terminal: characters that would move the cursor are spelled out."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def _report(error: Exception) -> tuple[str, int]:
    """The line about an error and the exit code; no line for one that is not the user's, whose traceback is to be seen."""
    if isinstance(error, UserError | OSError):  # a value of the user may be part of it
        return printable(str(error)), 2
    out_of_memory = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"  # the latter is torch's
    if out_of_memory or "DefaultCPUAllocator" in str(error):
        return "out of memory; use a smaller batch, or for training more of train.gradient_accumulation_steps", 2
    if isinstance(error, RuntimeError) and str(error).startswith("DataLoader worker"):
        return f"{first_line(error).rstrip('. ')}; fewer data.num_workers need less memory; resume a training with -r latest", 1
    group = _process_group()
    if group and isinstance(error, RuntimeError) and (isinstance(error, group.DistError) or _CONNECTION.search(str(error))):
        reason = re.sub(r"^\[[^]]*\] ", "", first_line(error)).partition(". This ")[0]  # without gloo's source line and advice
        lost = "another process has ended, hangs or cannot be reached (a training waits for train.timeout_minutes)"
        return f"{lost}: {reason}; resume a training with -r latest", 1
    return "", 1


def _process_group() -> ModuleType | None:
    """torch.distributed where this process has joined others. torch takes seconds to import, so this does not."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.distributed.is_available() or not torch.distributed.is_initialized():
        return None
    return torch.distributed
