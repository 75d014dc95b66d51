"""SIGTERM and Ctrl-C ask a run to stop at the end of its step; a second Ctrl-C stops it at once."""

import signal
import sys
from collections.abc import Callable
from types import FrameType
from typing import NoReturn


class StopSignal:
    """Inside the block, `received` is the number of the signal that arrived, or None."""

    def __enter__(self) -> "StopSignal":
        self.received: int | None = None
        self._before = {number: signal.signal(number, self._handle) for number in (signal.SIGTERM, signal.SIGINT)}
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
        self.received = number
