"""Scripts that run other scripts: each step is a command that a user would type, and is printed."""

import shlex
import subprocess
import sys
from pathlib import Path


def run_command(arguments: list[str], launcher: str | None = None) -> None:
    """Run `python ARGUMENTS...`, or `LAUNCHER ARGUMENTS...`; leaves with the status of a command that fails."""
    shown = f"{launcher or 'python'} {shlex.join(arguments)}"
    print(f"\n$ {shown}", flush=True)
    status = subprocess.run([*(shlex.split(launcher) if launcher else [sys.executable]), *arguments]).returncode
    if status:
        sys.exit(status if status > 0 else 128 - status)  # a negative one is the signal that ended it


def train_arguments(config: str, run_dir: Path, overrides: list[str]) -> list[str]:
    """The command that starts the run, or goes on with it where it has begun."""
    begun = (run_dir / "config.yaml").is_file()
    return ["train.py", "-c", config, "-e", str(run_dir), *(["-r", "latest"] if begun else []), *overrides]
