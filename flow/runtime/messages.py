"""Words that several commands print: the last line, durations, lists of names."""

import time
from collections.abc import Sequence

NAMED_CLASSES = 20  # in a line of text


def summary(result: str, start: float, next_step: str) -> str:
    """The last line of a command: what was written and where, the time taken, what to do next.

    Args:
        start: `time.perf_counter()` at the start, which `cli.Parser.parse` stores.
        next_step: an imperative and, behind "with: ", a command that works as printed.

    Example:
        >>> print(summary("64 images in samples/mnist", args.start, "watch them form with: python -m scripts.animate ..."))
    """
    return f"{result}, in {duration(time.perf_counter() - start)}; {next_step}"


def duration(seconds: float) -> str:
    """Seconds, minutes or hours, with one decimal."""
    if seconds < 90:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.1f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def first_names(names: Sequence[str], most: int = NAMED_CLASSES) -> str:
    """The first names, for a line of text: 'cat, dog, ...'."""
    return ", ".join(names[:most]) + (", ..." if len(names) > most else "")
