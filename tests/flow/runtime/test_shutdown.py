"""What asks a run to stop, beside the signals that the tests of train.py send."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from flow.runtime.errors import CONTINUES, cli_main
from flow.runtime.shutdown import StopSignal

PRINTS = """
import signal, sys
from flow.runtime.shutdown import StopSignal
signal.signal(signal.SIGHUP, getattr(signal, sys.argv[1]))
with StopSignal() as stop:
    sys.stdin.readline()
    print("a line that nobody reads", flush=True)
    print("and another one", flush=True)
sys.exit(stop.received or 0)
"""


def run_unread(*command: str) -> tuple[int, bytes]:
    """(status, stderr) of a command whose standard output nobody reads; it goes on once stdin has a line."""
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout and process.stdin and process.stderr
    process.stdout.close()
    with process.stdin, process.stderr:
        process.stdin.write(b"\n")
        process.stdin.close()
        return process.wait(60), process.stderr.read()


@pytest.mark.parametrize(("handler", "status"), [("SIG_DFL", signal.SIGHUP), ("SIG_IGN", 0)])
def test_closed_pipe_counts_as_closed_terminal(handler, status):
    """Printing goes on without an error; under nohup, which ignores SIGHUP, nothing stops."""
    assert run_unread(sys.executable, "-c", PRINTS, handler) == (status, b"")


@pytest.mark.parametrize(("unbuffered", "status"), [("", 0), ("1", 141)])
def test_a_line_that_nobody_reads_is_no_error(monkeypatch, unbuffered, status):
    """Where it is the last one, all work is done; else the command leaves as others do behind a pipe."""
    monkeypatch.setenv("PYTHONUNBUFFERED", unbuffered)
    code = "import sys; from flow.runtime.errors import cli_main; cli_main(lambda: print(sys.stdin.readline()))"
    assert run_unread(sys.executable, "-c", code) == (status, b"")


def test_a_process_of_a_group_leaves_at_once():
    """Whatever takes the interpreter down is not waited for: threads of gloo would abort it."""
    code = "import atexit, os, sys; from flow.runtime.errors import cli_main; atexit.register(os._exit, 7)\n"
    for more, status in (({"WORLD_SIZE": "2"}, 143), ({}, 7)):
        run = [sys.executable, "-c", f"{code}os.environ.update({more}); cli_main(lambda: sys.exit(143))"]
        assert subprocess.run(run, timeout=120).returncode == status


def test_ctrl_c_after_another_signal():
    """The checkpoint that SIGTERM asks for is written; a second Ctrl-C is a wish to leave at once."""
    with StopSignal() as stop:
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.raise_signal(number)
        assert stop.received == signal.SIGINT
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


@pytest.mark.parametrize(
    ("number", "line"), [(signal.SIGTERM, "SIGTERM: soon"), (signal.SIGINT, "SIGINT: soon; Ctrl-C again stops at once")]
)
def test_first_signal_is_answered_at_once(capfd, monkeypatch, number, line):
    monkeypatch.delenv("ACCELERATE_MIXED_PRECISION", raising=False)
    with StopSignal("soon"):
        signal.raise_signal(number)
        signal.raise_signal(signal.SIGTERM)
    assert capfd.readouterr().err == f"\n{line}\n"


@pytest.mark.parametrize(("more", "line"), [((), "interrupted"), ((CONTINUES,), "interrupted; the same command continues")])
def test_ctrl_c_says_what_goes_on(capsys, monkeypatch, more, line):
    """One line of the first process; a traceback would hide it."""

    def main() -> None:
        raise KeyboardInterrupt  # as Python does at SIGINT, which a shell's background job ignores

    for rank in ("1", "0"):
        monkeypatch.setenv("RANK", rank)
        with pytest.raises(SystemExit) as left:
            cli_main(main, *more)
        assert left.value.code == 130
    assert capsys.readouterr().err == f"\n{line}\n"


@pytest.mark.skipif(sys.platform != "linux", reason="Linux alone ends a process with its parent")
@pytest.mark.parametrize(("parent", "number"), [("accelerate-launch", signal.SIGTERM), ("accelerate_runs.sh", 0)])
def test_only_a_launcher_takes_its_process_along(tmp_path, parent, number):
    """A shell may end while its processes go on."""
    child = "import ctypes; from flow.runtime import shutdown; shutdown.end_with_launcher(); "
    child += (
        "number = ctypes.c_int(); ctypes.CDLL(None).prctl(2, ctypes.byref(number)); print(number.value)"  # PR_GET_PDEATHSIG
    )
    script = tmp_path / parent
    script.write_text(f"{sys.executable} -c '{child}'\ntrue\n")
    environment = {**os.environ, "ACCELERATE_MIXED_PRECISION": "no", "PYTHONPATH": str(Path(__file__).parents[3])}
    environment.pop("LOCAL_WORLD_SIZE", None)
    run = subprocess.run(["bash", script], env=environment, capture_output=True, text=True, check=True)
    assert run.stdout == f"{int(number)}\n"
