"""Rows that evaluate.py measures in a process of its own."""

import tempfile
from pathlib import Path

from flow.evaluation import table
from flow.runtime import subprocesses


def rows_of(arguments: list[str], launcher: str | None = None) -> list[dict]:
    """The rows of this command, of `commands.evaluate_arguments`, whether new or found in its table; that of real images is
    the first. Its table may hold others that look alike, such as those of other overrides."""
    with tempfile.TemporaryDirectory() as scratch:
        file = Path(scratch) / "rows.jsonl"
        subprocesses.run_command([*arguments, "--rows_file", str(file)], launcher)
        return table.read_rows(file)
