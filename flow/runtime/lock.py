"""One writer for a folder: an advisory lock of the system (flock), which ends with the process that holds it."""

import json
import os
import shutil
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

import psutil
from accelerate import Accelerator
from filelock import FileLock, Timeout

from configs.errors import UserError
from flow.runtime import distributed, files

PATIENCE_SECONDS = 3.0  # children of a killed process may hold its lock for a moment
SINCE_FORMAT = "%Y-%m-%d %H:%M:%S %z"


@dataclass(frozen=True)
class Holder:
    """The process that has signed a lock file."""

    host: str
    pid: int
    since: str  # local time with its offset, SINCE_FORMAT

    def is_alive(self) -> bool | None:
        """Whether the process is still there; None for one on another host."""
        if self.host != socket.gethostname():
            return None
        with suppress(psutil.Error, ValueError):
            process = psutil.Process(self.pid)
            # A process that has started later has only inherited the number; seconds of a clock may differ by one.
            started_before = process.create_time() <= datetime.strptime(self.since, SINCE_FORMAT).timestamp() + 1
            return started_before and process.status() != psutil.STATUS_ZOMBIE
        return False


def holder(path: Path) -> Holder | None:
    """Who has signed the lock file of a folder, read without taking the lock; a killed process leaves its signature behind."""
    try:
        signature = json.loads((path / files.LOCK).read_text(encoding="utf-8"))
        return Holder(str(signature["host"]), int(signature["pid"]), str(signature["since"]))
    except (OSError, ValueError, KeyError, TypeError, OverflowError, RecursionError):
        return None


@contextmanager
def folder(path: Path, accelerator: Accelerator | None = None) -> Iterator[None]:
    """Hold the lock of a folder that the block writes to; the main process takes it for all processes.

    A folder that does not exist is created, and removed again with its new parents where the block leaves nothing in it.
    What the block must not overwrite is checked inside it. The lock file holds host, process and time of its holder, and is
    removed at the end; one that a killed process left behind is no lock.

    Raises:
        UserError: on every process, where another process holds the lock or the folder cannot be locked.
    """
    lock = _FolderLock(path)
    if accelerator is None:
        lock.acquire()
    else:
        distributed.decided_by_main(lock.acquire)
    try:
        yield
    finally:
        if accelerator is None or accelerator.is_main_process:
            lock.release()


@contextmanager
def unfinished(path: Path) -> Iterator[Path]:
    """A new folder beside `path`, to be written and then renamed by `files.atomic_rename_dir`; the lock is beside it.

    It is removed where the block does not rename it, and so is what a killed process left. Raises UserError as `folder` does.
    """
    work = path.absolute().with_name(f"{files.TEMPORARY}{path.absolute().name}")
    new = work / "new"
    try:
        with folder(work):
            shutil.rmtree(new, ignore_errors=True)
            try:
                new.mkdir()
                yield new
            finally:
                shutil.rmtree(new, ignore_errors=True)
    finally:
        with suppress(OSError):  # it is gone, or another process has begun
            work.rmdir()


class _FolderLock:
    """The lock of a folder, for one process."""

    def __init__(self, path: Path):
        self.path = path
        self.file = path / files.LOCK
        # The library would otherwise fall back to a file whose existence is the lock, and which outlives its process.
        self.lock = FileLock(self.file, fallback_to_soft=False, on_acquired=self._sign)
        self.created: list[Path] = []  # folders, the deepest first
        self.identity: os.stat_result | None = None  # of the file that is locked

    def acquire(self) -> None:
        """Raises UserError where another process holds the lock, or the folder cannot be locked."""
        deadline = time.monotonic() + PATIENCE_SECONDS
        while True:
            try:
                self.created = [new for new in (self.path, *self.path.parents) if not new.exists()] or self.created
                self.path.mkdir(parents=True, exist_ok=True)
                self.lock.acquire(timeout=max(0.0, deadline - time.monotonic()), poll_interval=0.1)
                return
            except Timeout:
                reason = f"{self._holder()}; wait until it ends, or name another folder"
            except FileExistsError:
                reason = "is a file; name a folder"
            except OSError as error:
                if isinstance(error, FileNotFoundError) and time.monotonic() < deadline:
                    continue  # the holder before has just removed the folder, or its lock file
                reason = f"cannot be written and locked: {error.strerror or error}"
            raise UserError(f"{self.path}: {reason}")

    def release(self) -> None:
        with suppress(OSError):
            if self.identity and os.path.samestat(self.identity, self.file.stat()):  # the user may have removed the folder
                self.file.unlink()  # while it is locked: whoever waits for this file then looks for a new one
        self.lock.release()
        with suppress(OSError):  # not empty
            for new in self.created:
                new.rmdir()

    def _sign(self, descriptor: int) -> None:
        """Write into the lock file who holds it. Raises FileNotFoundError where its name is that of another file by now."""
        self.identity = os.fstat(descriptor)
        if not os.path.samestat(self.identity, self.file.stat()):
            raise FileNotFoundError(f"{self.file}: was removed while this process waited for it")
        signature = {"host": socket.gethostname(), "pid": os.getpid(), "since": time.strftime(SINCE_FORMAT)}
        with suppress(OSError):  # a full disk: the lock holds without a note
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, json.dumps(signature).encode(), 0)

    def _holder(self) -> str:
        signed = holder(self.path)
        if signed is None:
            return "another process is writing here"
        return f"process {signed.pid} on {signed.host} has been writing here since {signed.since}"
