"""The log of a run: which errors of which process are written to it."""

from types import SimpleNamespace

import pytest

from configs.errors import UserError
from configs.schema import Config
from flow.training.logging import Logger


@pytest.mark.parametrize(
    ("error", "rank", "line"),
    [
        (UserError("data.name: no such data"), 0, "error: data.name: no such data\n"),
        (UserError("data.name: no such data"), 1, ""),  # all processes have it
        (RuntimeError("out of memory"), 0, "error: RuntimeError: out of memory\n"),
        (RuntimeError("out of memory"), 1, "error: process 1: RuntimeError: out of memory\n"),
    ],
)
def test_errors_of_processes(tmp_path, error, rank, line):
    """An error that only one process has is in the log, and names the process; one that all have is there once."""
    config = Config()
    config.train.log_with = []
    logger = Logger(SimpleNamespace(is_main_process=rank == 0, process_index=rank), tmp_path, config, first_step=0)
    with pytest.raises(type(error)), logger.recording_errors():
        raise error
    log = tmp_path / "log.txt"
    assert (log.read_text() if log.exists() else "") == line
