"""JSON-lines files: rows are appended whole or not at all, damaged lines are reported by number."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from flow.runtime import files

_SHOWN = 40  # characters of a damaged line in a message


@dataclass(frozen=True)
class Line:
    """One line of a file that is not blank."""

    number: int  # from 1
    raw: bytes  # without the newline
    row: dict | None  # None: damaged
    damage: str = ""  # why it is no row


def append(path: Path, row: dict) -> None:
    """Append a row as one line, synced to disk, whole or not at all. Raises OSError that names the file."""
    files.append_line(path, json.dumps(row), sync=True)


def read_lines(path: Path, check: Callable[[dict], str | None]) -> list[Line]:
    """The lines of a file in their order, without blank ones; a file that does not exist has none.

    `check(row)` returns why a JSON object is not a row of this file, or None. Raises: OSError.
    """
    lines = []
    for number, raw in enumerate(path.read_bytes().split(b"\n") if path.exists() else [], start=1):
        if not raw.strip():
            continue
        try:
            row = json.loads(raw.decode("utf-8"))
            damage = check(row) if isinstance(row, dict) else "it is not a JSON object"
        except UnicodeDecodeError:
            row, damage = None, "it is not UTF-8"
        except (ValueError, RecursionError):  # also numbers of thousands of digits, and brackets nested as deep
            row, damage = None, "it is not JSON"
        lines.append(Line(number, raw, None if damage else row, damage or ""))
    return lines


def describe(path: Path, line: Line) -> str:
    """One sentence about a damaged line: file, line number, reason, beginning of the line."""
    start = line.raw.decode("utf-8", errors="replace")[:_SHOWN]
    return f"{path}, line {line.number}: {line.damage}, so it is not used: {start!r}"


def is_number(value: object) -> bool:
    """Whether a JSON value is a float, or a whole number of at most 64 bits; true and false are neither."""
    return isinstance(value, float) or (isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**63)
