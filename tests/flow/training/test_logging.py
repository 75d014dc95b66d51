"""The log of a run: the errors of its processes."""

from types import SimpleNamespace

import pytest

from configs.errors import UserError
from configs.schema import Config
from flow.training.logging import Logger


@pytest.mark.parametrize(
    ("error", "rank", "line"),
    [
        (UserError("data.name: no such data"), 0, "error: data.name: no such data\n"),
        (UserError("cat.png: not a readable image"), 1, "error: process 1: cat.png: not a readable image\n"),
        (RuntimeError("out of memory"), 0, "error: RuntimeError: out of memory\n"),
        (RuntimeError("out of memory"), 1, "error: process 1: RuntimeError: out of memory\n"),
    ],
)
def test_errors_of_processes(tmp_path, error, rank, line):
    """An error is in the log, and names the process where it is not the main one."""
    config = Config()
    config.train.log_with = []
    logger = Logger(SimpleNamespace(is_main_process=rank == 0, process_index=rank), tmp_path, config, first_step=0)
    with pytest.raises(type(error)), logger.recording_errors():
        raise error
    assert (tmp_path / "log.txt").read_text() == line
