"""Commands that a user would type: run and printed by scripts that run other scripts, or suggested as the next step."""

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from tqdm import tqdm

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


def relaunched(*arguments: str | Path) -> str:
    """The command that starts a script with as many processes as this one was. Of several machines or sharded weights only the
    launcher's own command knows all."""
    processes = os.environ.get("WORLD_SIZE")
    if processes is None:
        return command(*arguments)
    sharded = os.environ.get("ACCELERATE_USE_FSDP", "").lower() == "true"
    if sharded or os.environ.get("LOCAL_WORLD_SIZE", processes) != processes:
        return f"the launcher of this command and {shlex.join(map(str, arguments))}"
    return command(*arguments, launcher=torchrun(processes))


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


def run_chains(chains: dict[Path, Iterator[list[str]]], jobs: int, unit: str) -> None:
    """Run chains of `python ARGUMENTS...`, `jobs` of them at the same time; the next command of a chain is asked for when the
    one before it has ended.

    What the commands of a chain print goes to a file, its key. Leaves with the status of a command that fails, after the last
    lines of its file, once the commands beside it have been stopped. Signals reach the commands as in `run_command`.
    """
    waiting, running = list(chains.items()), list[_Running]()
    with StopSignal() as stop, tqdm(total=len(chains), unit=unit, desc=unit) as bar:
        while waiting or running:
            while waiting and len(running) < jobs:
                log, commands = waiting.pop(0)
                log.parent.mkdir(parents=True, exist_ok=True)
                running.append(_Running(log, commands))
            for chain in list(running):
                if not chain.advance():
                    running.remove(chain)
                    bar.update()
            failed = next((chain for chain in running if chain.status), None)
            if failed or stop.received:
                number = stop.received or signal.SIGTERM
                processes = [chain.process for chain in running if chain.process and chain.status is None]
                for process in processes:
                    if number != signal.SIGINT:  # Ctrl-C has reached them by itself, and a second one would stop them at once
                        process.send_signal(number)
                for process in processes:
                    process.wait()
                if failed:
                    failed.leave()
                sys.exit(128 + number)
            time.sleep(0.1)


@dataclass
class _Running:
    """A chain of commands that has begun."""

    log: Path
    commands: Iterator[list[str]]
    process: subprocess.Popen | None = None

    @property
    def status(self) -> int | None:
        """Exit status of the present command, None while it runs."""
        return self.process.poll() if self.process else None

    def advance(self) -> bool:
        """Start the next command once the last one has ended well; false at the end of the chain."""
        if self.process and self.status != 0:
            return True
        arguments = next(self.commands, None)
        if arguments is None:
            return False
        with self.log.open("a", encoding="utf-8") as out:
            print(f"\n$ {command(*arguments)}", file=out, flush=True)
            self.process = subprocess.Popen([sys.executable, *arguments], stdout=out, stderr=subprocess.STDOUT)
        return True

    def leave(self) -> NoReturn:
        """End this process as the present command ended, with the last lines that it printed."""
        print("\n".join(self.log.read_text(encoding="utf-8", errors="replace").splitlines()[-5:]), file=sys.stderr)
        print(f"see {self.log}", file=sys.stderr)
        assert self.status is not None
        sys.exit(self.status if self.status > 0 else 128 - self.status)


def train_arguments(config: str, run_dir: Path, overrides: list[str]) -> list[str]:
    """The command that starts the run, or resumes it where it was started."""
    started = (run_dir / "config.yaml").is_file()
    return ["train.py", "-c", config, "-e", str(run_dir), *(["-r", "latest"] if started else []), *overrides]
