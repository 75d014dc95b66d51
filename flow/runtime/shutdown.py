"""SIGTERM, Ctrl-C and a closed terminal ask a run to stop at the end of its step; a second Ctrl-C stops it at once."""

import os
import signal
import sys
from collections.abc import Callable
from types import FrameType
from typing import NoReturn

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)  # SIGHUP: the terminal was closed


class StopSignal:
    """Inside the block, `received` is the number of the signal that arrived, or None.

    SIGHUP stays ignored where it is ignored at the start, as nohup does.
    """

    def __enter__(self) -> "StopSignal":
        self.received: int | None = None
        self._terminals = [descriptor for descriptor in (1, 2) if os.isatty(descriptor)]
        ignored = signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
        numbers = [number for number in SIGNALS if not (ignored and number == signal.SIGHUP)]
        self._before = {number: signal.signal(number, self._handle) for number in numbers}
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def leave(self, say: Callable[[str], None], advice: str) -> NoReturn:
        """End a run that was stopped, by a signal to this process or another, with the exit code that shells give to it."""
        number = self.received or signal.SIGTERM
        say(f"stopped by {signal.Signals(number).name}; {advice}")
        sys.exit(128 + number)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.received is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        if number == signal.SIGHUP:
            self._leave_terminal()
        self.received = number

    def _leave_terminal(self) -> None:
        """Send what is still printed nowhere: writing to a terminal that was closed is an error."""
        nowhere = os.open(os.devnull, os.O_WRONLY)
        for descriptor in self._terminals:
            os.dup2(nowhere, descriptor)
        os.close(nowhere)
