"""Chains of commands, several at the same time."""

import os
import time

import pytest

from configs.errors import UserError
from flow.runtime.subprocesses import run_chains

MEET = """
import pathlib, sys, time
mine, other = map(pathlib.Path, sys.argv[1:])
mine.touch()
while not other.exists():
    time.sleep(0.01)
print("met")
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
    file = tmp_path / "pid"

    def fails():
        while not file.exists():
            time.sleep(0.01)
        raise UserError("no such recipe")
        yield []

    waits = [["-c", f"import os, time; open({str(file)!r}, 'w').write(str(os.getpid())); time.sleep(600)"]]
    with pytest.raises(UserError, match="no such recipe"):
        run_chains({tmp_path / "b.log": iter(waits), tmp_path / "a.log": fails()}, 2, "chains")
    with pytest.raises(ProcessLookupError):
        os.kill(int(file.read_text()), 0)
