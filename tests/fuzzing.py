"""Cases of mutated input: how each ends, and how many ended in which way."""

import os
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from flow.runtime.errors import cli_main

CASES = int(os.environ.get("FLOW_FUZZ_CASES", "2000"))  # of a long test


class Outcomes(Counter):
    """How many cases ended in which way; `failures` describes those with a traceback, a wrong number or half of a run."""

    def __init__(self):
        super().__init__()
        self.failures: list[str] = []

    @contextmanager
    def case(self, shown: object) -> Iterator[None]:
        """One case; what its assertions find is a failure, and the next case goes on."""
        try:
            yield
        except AssertionError as error:
            self.failures.append(f"{shown}: {error}")

    def __str__(self) -> str:
        counts = ", ".join(f"{n} {what}" for what, n in sorted(self.items()))
        return f"{self.total()} cases: {counts}; {len(self.failures)} failures"


def attempt(main_of, capsys, script: str, arguments: list[str]) -> str:
    """Run the script in this process; returns 'ran' or its one line of error, and fails on anything else."""
    return attempt_and_read(main_of, capsys, script, arguments)[0]


def attempt_and_read(main_of, capsys, script: str, arguments: list[str]) -> tuple[str, str]:
    """The same, with all that was printed."""
    shown = f"{script} {arguments}"
    try:
        with pytest.raises(SystemExit) as left:
            cli_main(main_of(script, *arguments))
    except BaseException as error:
        raise AssertionError(f"{shown}: {type(error).__name__} {error}") from error
    out, err = capsys.readouterr()
    if left.value.code == 0:
        return "ran", out + err
    lines = [line for line in err.splitlines() if line.startswith("error: ")]
    assert left.value.code == 2 and len(lines) == 1 and "Traceback" not in err, f"{shown}: {left.value.code}\n{err}"
    assert err.rstrip("\n").endswith(lines[0]), f"{shown}: more than a line after it\n{err}"
    return lines[0], out + err
