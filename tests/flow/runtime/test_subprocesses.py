"""Chains of commands, several at the same time."""

import os
import signal
import sys
import threading
import time

import pytest

from configs.errors import UserError
from flow.runtime import commands
from flow.runtime.subprocesses import run_chains, run_command, run_quietly

MEET = """
import pathlib, sys, time
mine, other = map(pathlib.Path, sys.argv[1:])
mine.touch()
for _ in range(6000):
    if other.exists():
        print("met")
        break
    time.sleep(0.01)
"""
WAIT_FOR_LINE = r"""
import pathlib, sys, time
for _ in range(6000):
    if "\nprocess " in pathlib.Path(sys.argv[1]).read_text():
        break
    time.sleep(0.01)
"""


def test_two_chains_at_the_same_time(tmp_path):
    """Each waits for the other; its second command is asked for once the first has ended."""

    def chain(mine, other):
        yield ["-c", MEET, str(tmp_path / mine), str(tmp_path / other)]
        assert "met" in (tmp_path / f"{mine}.log").read_text()
        yield ["-c", "print('second')"]

    run_chains({tmp_path / f"{a}.log": chain(a, b) for a, b in ("ab", "ba")}, 2, "chains")
    assert all((tmp_path / f"{name}.log").read_text().endswith("second\n") for name in "ab")


def test_a_command_that_fails_ends_the_others(tmp_path, capsys):
    fails = [["-c", "import sys; print('no such recipe'); sys.exit(2)"], ["-c", "print('never')"]]
    waits = [["-c", "import time; time.sleep(600)"]]
    with pytest.raises(SystemExit) as error:
        run_chains({tmp_path / "a.log": iter(fails), tmp_path / "b.log": iter(waits)}, 2, "chains")
    assert error.value.code == 2
    assert "no such recipe" in capsys.readouterr().err and "never" not in (tmp_path / "a.log").read_text()


def test_no_command_outlives_an_error(tmp_path):
    """Of whoever plans the next command."""
    log = tmp_path / "b.log"

    def fails():
        yield ["-c", WAIT_FOR_LINE, str(log)]
        raise UserError("no such recipe")

    waits = [["-u", "-c", "import os, time; print('process', os.getpid()); time.sleep(600)"]]
    with pytest.raises(UserError, match="no such recipe"):
        run_chains({log: iter(waits), tmp_path / "a.log": fails()}, 2, "chains")
    _, process = log.read_text().splitlines()[-1].split()
    with pytest.raises(ProcessLookupError):
        os.kill(int(process), 0)


def test_commands_run_as_they_are_printed(tmp_path, monkeypatch, capfd):
    """From a folder that is not the root of the repository: a script and a module of it are found."""
    root = tmp_path / "root"
    (root / "scripts").mkdir(parents=True)
    for script in ("hello.py", "scripts/hello.py"):
        (root / script).write_text(f"print('hello from {script}')")
    monkeypatch.setattr(commands, "REPOSITORY", root)
    monkeypatch.chdir(tmp_path)
    for words in (["hello.py"], ["-m", "scripts.hello"]):
        run_command(words)
        printed = capfd.readouterr().out
        assert f"$ {commands.command(*words)}\nhello from " in printed
    run_chains({tmp_path / "log": iter([["hello.py"], ["-m", "scripts.hello"]])}, 1, "chains")
    assert (tmp_path / "log").read_text().count("hello from ") == 2


def test_quiet_command_ends_with_its_caller(tmp_path):
    """Else it would go on beside whatever is started next."""
    assert run_quietly([sys.executable, "-c", "import sys; sys.exit('no such job')"], dict(os.environ)) == (1, "no such job\n")
    written = tmp_path / "process"
    code = "import os, pathlib, sys, time; pathlib.Path(sys.argv[1]).write_text(f'{os.getpid()}.'); time.sleep(600)"

    def stop() -> None:
        for _ in range(6000):
            if written.is_file() and written.read_text().endswith("."):
                break
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=stop).start()
    with pytest.raises(SystemExit) as left:
        run_quietly([sys.executable, "-c", code, str(written)], dict(os.environ))
    assert left.value.code == 128 + signal.SIGTERM
    with pytest.raises(ProcessLookupError):
        os.kill(int(written.read_text().rstrip(".")), 0)
