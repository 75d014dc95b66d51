"""Chains of commands, several at the same time."""

import pytest

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
