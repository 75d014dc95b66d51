"""What the checks of scripts/doctor/ examine, and what they answer."""

import argparse
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from accelerate import Accelerator

from configs.schema import Config
from datasets import DataSet
from scripts.doctor.trial import Trial


@dataclass
class Context:
    """What the checks examine; what an earlier check could not build stays None."""

    args: argparse.Namespace  # of the command line
    cfg: Config
    accelerator: Accelerator
    run_dir: Path
    data: DataSet | None = None
    net: torch.nn.Module | None = None  # without weights, on the meta device
    trial: Trial | None = None
    lines: list[tuple[str, str, str]] = field(default_factory=list)  # (level, name, text)


Lines = Iterator[tuple[str, str]]  # (pass | warn | fail, the result and how to fix it)
Check = Callable[[Context], Lines]  # the report calls it by the name of the function
