"""evaluate.py in a process of its own, for scripts that build on its rows."""

import tempfile
from pathlib import Path

from flow.evaluation import results
from flow.runtime import subprocesses


def run(arguments: list[str], launcher: str | None = None) -> list[dict]:
    """The rows of a command of `commands.evaluate_arguments`, computed or found in its table; that of real images comes
    first. The table may hold others that look alike, such as those of other overrides."""
    with tempfile.TemporaryDirectory() as scratch:
        file = Path(scratch) / "rows.jsonl"
        subprocesses.run_command([*arguments, "--rows_file", str(file)], launcher)
        return results.read(file)
