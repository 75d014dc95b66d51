"""Work that is done while the device is busy with what came before."""

import threading
from collections.abc import Iterable, Iterator
from queue import Queue
from typing import TypeVar

T = TypeVar("T")


def ahead(items: Iterable[T], depth: int) -> Iterator[T]:
    """The items in their order, made by a thread up to `depth` before they are asked for; 0 makes each when it is.

    An error of the thread comes out where its item was expected. Leaving early ends the thread.
    """
    if not depth:
        yield from items
        return
    made: Queue[tuple[bool, object]] = Queue()
    room, left = threading.Semaphore(depth), threading.Event()

    def work() -> None:
        try:
            for item in items:
                made.put((True, item))
                room.acquire()
                if left.is_set():
                    return
            made.put((False, None))
        except BaseException as error:
            made.put((False, error))

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    try:
        while True:
            more, item = made.get()
            if not more:
                if item is not None:
                    raise item  # type: ignore[misc]
                return
            yield item  # type: ignore[misc]
            room.release()
    finally:
        left.set()
        room.release()
        thread.join()
