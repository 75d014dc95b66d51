"""metrics.jsonl: lines that were cut off, and a run that goes on."""

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from torch import nn

from configs import schema
from flow.runtime import distributed
from flow.training.logging import Logger, read_metrics


@pytest.fixture
def accelerator() -> Accelerator:
    accelerator, net = distributed.build_accelerator(), nn.Linear(2, 2)
    accelerator.prepare(net, torch.optim.AdamW(net.parameters()))  # what its checkpoints hold
    return accelerator


def test_truncated_metrics_line_is_left_out(tmp_path):
    """Read metrics leaves out a line that was cut off."""
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "loss": 0.5}\n{"step": 2, "loss": NaN}\n{"step": 3, "lo')
    first, second = read_metrics(path)
    assert first == {"step": 1, "loss": 0.5} and second["step"] == 2 and np.isnan(second["loss"])
    path.write_text("")
    assert read_metrics(path) == []


TAILS = {"none": "", "cut": '{"step": 3, "lo', "whole": '{"step": 3, "loss": 3.0}\n', "both": '{"step": 3, "loss": 3.0}\n{"st'}


@pytest.mark.parametrize("tail", TAILS.values(), ids=TAILS)
def test_a_resumed_run_goes_on_with_its_metrics(accelerator, tmp_path, tail):
    """Resumed from step 2, whatever was written after it before the crash."""
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 2, "loss": 2.0}\n' + tail)
    tracker = Logger(accelerator, tmp_path, schema.load(None, ["train.log_with=[]"]), first_step=2)
    tracker.log(4, {"loss": 4.0})
    assert read_metrics(path) == [{"step": 2, "loss": 2.0}, {"step": 4, "loss": 4.0}]
