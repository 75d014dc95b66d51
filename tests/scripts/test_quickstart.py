"""The quickstart in a folder that has a run already: what it trains, and where its samples go. Its commands are not run."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import pytest

from scripts import quickstart


@pytest.fixture
def start(here, monkeypatch, tmp_path) -> Callable[[], tuple[str, list[list[str]]]]:
    """start(): what the quickstart prints, and its commands; the present folder is an empty one."""
    monkeypatch.chdir(tmp_path)

    def call() -> tuple[str, list[list[str]]]:
        commands: list[list[str]] = []
        monkeypatch.setattr(quickstart, "run_command", commands.append)
        return here("quickstart"), commands

    return call


@pytest.mark.parametrize(("step", "trains"), [(275, True), (550, True), (2000, False)])
def test_longer_training_is_left_as_it_is(start, step, trains):
    """Which train.py would refuse to resume."""
    (quickstart.RUN / f"checkpoints/step_{step:08d}").mkdir(parents=True)
    printed, commands = start()
    assert (commands[0][0] == "train.py") == trains
    assert ("runs/digits is at step 2000 already, past the 550 of " in printed) == (not trains)


def test_samples_of_other_weights_stay(start):
    """Those of the same weights are gone on with, wherever they are."""

    def folder() -> Path:
        printed, commands = start()
        sample = next(words for words in commands if words[0] == "sample.py")
        chosen = Path(sample[sample.index("--save_dir") + 1])
        assert f"\n{chosen}/grid.png" in printed
        return chosen

    weights = quickstart.RUN / "snapshots/step_00000550.safetensors"
    weights.parent.mkdir(parents=True)
    weights.write_bytes(b"weights")
    assert folder() == Path("samples/quickstart")
    for name, content in {"quickstart": b"others", "quickstart_2": b"weights"}.items():
        assert folder() == Path("samples") / name
        (Path("samples") / name).mkdir(parents=True)
        record = {"weights_sha256": hashlib.sha256(content).hexdigest()}
        (Path("samples") / name / "sampling.json").write_text(json.dumps(record))
    assert folder() == Path("samples/quickstart_2")
    Path("samples/quickstart_2/sampling.json").write_text("{")
    assert folder() == Path("samples/quickstart_3")
