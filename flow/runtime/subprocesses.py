"""Commands that a user would type: run and printed by scripts that run other scripts, or suggested as the next step."""

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

from configs.schema import DataConfig
from flow.runtime.shutdown import StopSignal

YAML_WORDS = ("null", "true", "false", "yes", "no", "on", "off", "y", "n")  # that are not strings where they stand alone
REPOSITORY = Path(__file__).parents[2]


def command(*arguments: str | Path, launcher: str | None = None) -> str:
    """`python ARGUMENTS...` as a line that works in this folder and this shell: quoted, with the interpreter and the script
    where they are found from here."""
    script, *rest = map(str, arguments)
    if script.endswith(".py") and not Path(script).is_file():
        script = str(REPOSITORY / script)
    return f"{launcher or interpreter()} {shlex.join([script, *rest])}"


def interpreter(name: str = "python") -> str:
    """`name` where the shell finds this environment's program under it, else its path."""
    here = Path(sys.executable).with_name(name) if name != "python" else Path(sys.executable)
    on_path = shutil.which(name)
    if on_path and Path(on_path).absolute().parent == here.absolute().parent:
        return name
    return shlex.quote(os.path.relpath(here) if here.is_relative_to(Path.cwd()) else str(here))


def torchrun(processes: int | str) -> str:
    """The launcher of so many processes on this machine."""
    return f"{interpreter('torchrun')} --standalone --nproc_per_node {processes}"


def shipped(name: str) -> Path:
    """The path of a file in configs/ from here."""
    path = Path("configs") / name
    return path if path.is_file() else REPOSITORY / path


def override(key: str, value: Any) -> str:
    """`key=value`, the value as YAML on one line."""
    return f"{key}={_yaml(value)}"


def _yaml(value: Any) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key}: {_yaml(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(_yaml, value)) + "]"
    if isinstance(value, str) and re.fullmatch(r"[A-Za-z_/][\w./-]*", value) and value.lower() not in YAML_WORDS:
        return value
    return json.dumps(value, ensure_ascii=False)  # which is YAML too


def data_overrides(data: DataConfig) -> list[str]:
    """The overrides that name a data set."""
    values = {"data.name": data.name, "data.root": data.root, "data.args": data.args}
    return [override(key, value) for key, value in values.items() if value]


def run_command(arguments: list[str], launcher: str | None = None) -> None:
    """Run `python ARGUMENTS...`, or `LAUNCHER ARGUMENTS...`; leaves with the status of a command that fails.

    Ctrl-C, SIGTERM and SIGHUP reach the command, which may take its time to save what it has; then this process leaves too.
    """
    print(f"\n$ {command(*arguments, launcher=launcher)}", flush=True)
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
    """The command that starts the run, or resumes it where it was started."""
    started = (run_dir / "config.yaml").is_file()
    return ["train.py", "-c", config, "-e", str(run_dir), *(["-r", "latest"] if started else []), *overrides]
