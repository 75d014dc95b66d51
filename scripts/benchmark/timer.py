"""Where the time of a script goes: its own functions, wrapped from outside, so that the loops stay free of clocks."""

import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch

T = TypeVar("T")


class Timer:
    """Seconds by section name. A section inside another one counts for itself only; what other threads do meanwhile does not
    count at all."""

    def __init__(self, clock: Callable[[], float] = time.perf_counter):
        """clock: seconds. At every border the GPU is waited for, so that shares are right; that costs speed."""
        self._clock = clock
        self.seconds: dict[str, float] = defaultdict(float)
        self.laps: list[float] = []  # seconds of each lap
        self.first_lap = 0.0  # when the first one ended, in seconds of the epoch
        self._open: list[str] = []
        self._thread = threading.get_ident()
        self._since = self._lap = clock()
        self._wait = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None

    @contextmanager
    def section(self, name: str) -> Iterator[None]:
        if threading.get_ident() != self._thread:
            yield
            return
        self._border()
        self._open.append(name)
        try:
            yield
        finally:
            self._border()
            self._open.pop()

    def lap(self) -> None:
        """The end of a step or a batch."""
        self._border()
        now = self._clock()
        self.laps.append(now - self._lap)
        self._lap = now
        self.first_lap = self.first_lap or time.time()

    def timed(self, items: Iterable[T], warmup: int, count: int) -> Iterator[T]:
        """The items; the time of each is a lap. Drops the first `warmup` laps and ends after `count` more."""
        for done, item in enumerate(items, start=1):
            yield item
            self.lap()
            if done == warmup:
                self.restart()
            if done == warmup + count:
                return

    def restart(self) -> None:
        """Forget what was measured so far, as after a warm-up."""
        self._border()
        self.seconds.clear()
        self.laps.clear()
        self._lap = self._clock()

    def watch(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """`function`, timed as the section `name`."""

        def timed(*args, **kwargs):
            with self.section(name):
                return function(*args, **kwargs)

        return timed

    def _border(self) -> None:
        self._wait()
        now = self._clock()
        self.seconds[self._open[-1] if self._open else "other"] += now - self._since
        self._since = now


class TimedNetwork:
    """A network or feature extractor whose calls are a section of a timer."""

    def __init__(self, net: Any, timer: Timer, name: str):
        self.net = net
        self._call = timer.watch(name, net)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._call(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.net, name)
