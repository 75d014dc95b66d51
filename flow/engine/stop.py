"""SIGTERM and Ctrl-C ask a run to stop at the end of its step; a second Ctrl-C stops it at once."""

import signal
from types import FrameType


class StopSignal:
    """`received` is the number of the signal that arrived, or None."""

    def __init__(self) -> None:
        self.received: int | None = None
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._handle)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.received is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = number
