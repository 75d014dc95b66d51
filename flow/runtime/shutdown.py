"""SIGTERM, Ctrl-C, a closed terminal and a closed pipe ask a run to stop at the end of its step; a second Ctrl-C stops it at
once."""

import ctypes
import os
import re
import signal
import sys
from collections.abc import Callable, Iterable
from contextlib import redirect_stdout, suppress
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn, TextIO

PR_SET_PDEATHSIG = 1  # of prctl.h
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)  # SIGHUP: the terminal was closed


class StopSignal:
    """Inside the block, `received` is the number of the signal that arrived, or None.

    Where standard output is a pipe whose reader has left, as in `train.py | tee log` after Ctrl-C, that counts as
    SIGHUP. SIGHUP stays ignored where it is ignored at the start, as nohup does.
    """

    def __init__(self, notice: str = ""):
        """notice: printed to stderr when the first SIGTERM or Ctrl-C arrives, as what is running may take long to end."""
        self.notice = notice

    def __enter__(self) -> "StopSignal":
        self.received: int | None = None
        self._terminals = [descriptor for descriptor in (1, 2) if os.isatty(descriptor)]
        ignored = signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
        numbers = [number for number in SIGNALS if not (ignored and number == signal.SIGHUP)]
        self._before = {number: signal.signal(number, self._handle) for number in numbers}
        self._output = redirect_stdout(_Output(sys.stdout, self._lose_output))
        self._output.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self._output.__exit__(*error)  # type: ignore[arg-type]
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def leave(self, say: Callable[[str], None], advice: str) -> NoReturn:
        """End a run that was stopped, by a signal to this process or another, with the exit code that shells give to it."""
        number = self.received or signal.SIGTERM
        say(f"stopped by {signal.Signals(number).name}; {advice}")
        sys.exit(128 + number)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.received == number == signal.SIGINT:
            raise KeyboardInterrupt
        if self.received == signal.SIGINT and number == signal.SIGTERM:
            return  # the launcher has ended by the same Ctrl-C, see `end_with_launcher`
        if number == signal.SIGHUP:
            print_nowhere(self._terminals)
        elif self.notice and self.received is None:
            launched = "ACCELERATE_MIXED_PRECISION" in os.environ  # the launcher has left, and a second Ctrl-C is the shell's
            again = "; Ctrl-C again stops at once" if number == signal.SIGINT and not launched else ""
            with suppress(OSError):  # not by print, which may be what the signal has interrupted
                os.write(2, f"\n{signal.Signals(number).name}: {self.notice}{again}\n".encode())
        self.received = number

    def _lose_output(self) -> None:
        """Nobody reads standard output any more."""
        same = False
        with suppress(OSError):  # one of them may be closed
            same = os.path.samestat(os.fstat(1), os.fstat(2))
        print_nowhere([1, 2] if same else [1])
        if signal.SIGHUP in self._before and self.received is None:
            self.received = signal.SIGHUP


class _Output:
    """A stream whose writes do not fail where the reader of its pipe has left; `lost` is called then."""

    def __init__(self, stream: TextIO, lost: Callable[[], None]):
        self.stream, self.lost = stream, lost

    def write(self, text: str) -> int:
        try:
            return self.stream.write(text)
        except BrokenPipeError:
            self.lost()
            return len(text)

    def flush(self) -> None:
        try:
            self.stream.flush()
        except BrokenPipeError:
            self.lost()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


def end_with_launcher() -> None:
    """Have this process get SIGTERM when `accelerate-launch` ends, which passes no signal on to a single process: that would
    go on alone and hold its lock. The launcher of several processes ends them itself. Only accelerate as the parent counts, as
    a shell may end while its processes go on."""
    launcher = os.getppid()
    alone = "ACCELERATE_MIXED_PRECISION" in os.environ and "LOCAL_WORLD_SIZE" not in os.environ
    if not alone or sys.platform != "linux" or not _is_accelerate(launcher) or not hasattr(libc := ctypes.CDLL(None), "prctl"):
        return
    libc.prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != launcher:  # it ended before
        os.kill(os.getpid(), signal.SIGTERM)


def _is_accelerate(process: int) -> bool:
    """Whether a process of this machine is `accelerate-launch`, `accelerate launch` or a module of accelerate."""
    try:
        words = Path(f"/proc/{process}/cmdline").read_text(encoding="utf-8", errors="replace").split("\0")
    except OSError:
        return False
    return any(re.fullmatch(r"accelerate(-launch|\.commands\..+)?", Path(word).name) for word in words[:4])


def flush_output() -> None:
    """Write out what the streams hold; what nobody reads is lost without an error."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except BrokenPipeError:
            print_nowhere([stream.fileno()])


def print_nowhere(descriptors: Iterable[int]) -> None:
    """Send what is still printed there nowhere: writing to a terminal or a pipe that was closed is an error."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for descriptor in descriptors:
        os.dup2(nowhere, descriptor)
    os.close(nowhere)
