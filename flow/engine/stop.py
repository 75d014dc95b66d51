"""SIGTERM and Ctrl-C ask a run to stop at the end of its step; a second Ctrl-C stops it at once."""

import signal
from types import FrameType


class StopSignal:
    """Inside the block, `received` is the number of the signal that arrived, or None."""

    def __enter__(self) -> "StopSignal":
        self.received: int | None = None
        self._before = {number: signal.signal(number, self._handle) for number in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.received is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = number
