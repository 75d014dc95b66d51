"""Other commands of this project, run one after the other or several at a time."""

import os
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from tqdm import tqdm

from flow.runtime import files
from flow.runtime.commands import command, resolved, variables
from flow.runtime.shutdown import StopSignal


def run_command(arguments: list[str], launcher: str | None = None) -> None:
    """Run `python ARGUMENTS...`, or `LAUNCHER ARGUMENTS...`; leaves with the status of a command that fails.

    Ctrl-C, SIGTERM and SIGHUP reach the command, which may take its time to save what it has; then this process leaves too.
    """
    print(f"\n$ {command(*arguments, launcher=launcher)}", flush=True)
    with StopSignal() as stop:
        process = _start(arguments, launcher)
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


def run_quietly(words: list[str], environment: dict[str, str]) -> tuple[int, str]:
    """(status, standard error) of a command whose output nobody reads. Signals end it, and then this process."""
    with StopSignal() as stop, tempfile.TemporaryFile("w+", errors="replace") as stderr:
        process = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=stderr, env=environment)
        while True:
            try:
                status = process.wait(0.2)
                break
            except subprocess.TimeoutExpired:
                if stop.received:
                    process.terminate()
                    process.wait()
                    sys.exit(128 + stop.received)
        if stop.received:  # the signal has ended the command, too
            sys.exit(128 + stop.received)
        stderr.seek(0)
        return status, stderr.read()


def _start(arguments: list[str], launcher: str | None = None, **streams: Any) -> subprocess.Popen:
    """The process of the command that `command` prints."""
    words = resolved(*arguments)
    start = shlex.split(launcher) if launcher else [sys.executable]
    return subprocess.Popen([*start, *words], env={**os.environ, **variables(words)}, **streams)


def run_chains(chains: dict[Path, Iterator[list[str]]], jobs: int, unit: str) -> None:
    """Run chains of `python ARGUMENTS...`, `jobs` of them at the same time; the next command of a chain is asked for when the
    one before it has ended.

    What the commands of a chain print goes to a file, its key. Leaves with the status of a command that fails, after the last
    lines of its file, once the commands beside it have been stopped. Signals reach the commands as in `run_command`.
    """
    waiting, running = list(chains.items()), list[_Running]()
    with StopSignal() as stop, tqdm(total=len(chains), unit=unit, desc=unit) as bar, _terminating(running):
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


@contextmanager
def _terminating(running: list["_Running"]) -> Iterator[None]:
    """No command outlives an error in the block."""
    try:
        yield
    finally:
        processes = [chain.process for chain in running if chain.process and chain.status is None]
        for process in processes:
            process.terminate()
        for process in processes:
            process.wait()


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
        with self.log.open("a", encoding="utf-8", errors=files.NAMES) as out:
            print(f"\n$ {command(*arguments)}", file=out, flush=True)
            self.process = _start(arguments, stdout=out, stderr=subprocess.STDOUT)
        return True

    def leave(self) -> NoReturn:
        """End this process as the present command ended, with the last lines that it printed."""
        print("\n".join(self.log.read_text(encoding="utf-8", errors="replace").splitlines()[-5:]), file=sys.stderr)
        print(f"see {self.log}", file=sys.stderr)
        assert self.status is not None
        sys.exit(self.status if self.status > 0 else 128 - self.status)
