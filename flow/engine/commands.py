"""Scripts that run other scripts: each step is a command that a user would type, and is printed."""

import shlex
import signal
import subprocess
import sys
from pathlib import Path

from flow.engine.stop import StopSignal


def run_command(arguments: list[str], launcher: str | None = None) -> None:
    """Run `python ARGUMENTS...`, or `LAUNCHER ARGUMENTS...`; leaves with the status of a command that fails.

    Ctrl-C, SIGTERM and SIGHUP reach the command, which may take its time to save what it has; then this process leaves too.
    """
    print(f"\n$ {launcher or 'python'} {shlex.join(arguments)}", flush=True)
    with StopSignal() as stop:
        process = subprocess.Popen([*(shlex.split(launcher) if launcher else [sys.executable]), *arguments])
        forwarded = False
        while True:
            try:
                status = process.wait(0.2)
                break
            except subprocess.TimeoutExpired:
                # Ctrl-C reaches the whole foreground group by itself; a second SIGHUP changes nothing.
                if stop.received in (signal.SIGTERM, signal.SIGHUP) and not forwarded:
                    process.send_signal(stop.received)
                    forwarded = True
    if stop.received:
        sys.exit(128 + stop.received)
    if status:
        sys.exit(status if status > 0 else 128 - status)  # a negative one is the signal that ended it


def train_arguments(config: str, run_dir: Path, overrides: list[str]) -> list[str]:
    """The command that starts the run, or goes on with it where it has begun."""
    begun = (run_dir / "config.yaml").is_file()
    return ["train.py", "-c", config, "-e", str(run_dir), *(["-r", "latest"] if begun else []), *overrides]
