"""Trackers: those of Accelerate by name, those of the project by its registry; sample grids; a run stopped by a callback."""

import json

import pytest
from accelerate.tracking import GeneralTracker, on_main_process
from conftest import TINY_TRAIN

from configs import schema
from flow.runtime import distributed
from flow.training import checkpoint, logging
from flow.training.flow_task import FlowTask
from flow.training.logging import read_metrics
from flow.training.trainer import Callback, Trainer


class JSONTracker(GeneralTracker):
    """trackers.jsonl in the run folder."""

    name = "json"
    requires_logging_directory = True

    def __init__(self, folder):
        super().__init__()
        self.path = folder / "trackers.jsonl"

    @property
    def tracker(self):
        return self.path

    @on_main_process
    def store_init_configuration(self, values):
        self.path.write_text(json.dumps({"seed": values["seed"]}) + "\n")

    @on_main_process
    def log(self, values, step=None, **kwargs):
        with open(self.path, "a") as file:
            file.write(json.dumps({"step": step, **values}) + "\n")


WITH_PREVIEW = [word for word in TINY_TRAIN if not word.startswith(("train.sample_every", "train.log_with"))]


def test_registered_tracker(here, monkeypatch, tmp_path):
    """One line of TRACKERS; it gets the configuration and the rows of metrics.jsonl."""
    monkeypatch.setitem(logging.TRACKERS, "json", JSONTracker)
    here("train", *TINY_TRAIN[:-4], "preview.n_samples=4", "preview.sampling_steps=1", "preview.guidance_scale=1",
         "-e", tmp_path / "run", "train.log_with=[json]")  # fmt: skip
    first, *rows = map(json.loads, (tmp_path / "run" / "trackers.jsonl").read_text().splitlines())
    assert first == {"seed": 0} and rows == read_metrics(tmp_path / "run" / "metrics.jsonl")


def test_unknown_tracker_is_one_line(error, monkeypatch, tmp_path):
    """It lists the valid names, those of the registry too."""
    monkeypatch.setitem(logging.TRACKERS, "json", JSONTracker)
    line = error("train", *TINY_TRAIN, "-e", tmp_path / "run", "train.log_with=[json, foo]")
    assert "train.log_with=['json', 'foo']: unknown tracker 'foo'; choose from " in line and not (tmp_path / "run").exists()
    assert {"tensorboard", "wandb", "json"} <= set(line.partition("choose from ")[2].split(", "))


def test_sample_grid_reaches_tensorboard(here, tmp_path):
    event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    here("train", *WITH_PREVIEW, "-e", tmp_path / "run", "train.log_with=[tensorboard]", "train.sample_every_steps=2")
    events = event_accumulator.EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    events.Reload()
    assert "samples" in events.Tags()["images"] and "loss" in events.Tags()["scalars"]
    assert [event.step for event in events.Images("samples")] == [2, 4]


def test_sample_grid_reaches_wandb(here, monkeypatch, tmp_path):
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    here("train", *WITH_PREVIEW, "-e", tmp_path / "run", "train.log_with=[wandb]", "train.sample_every_steps=2")
    wandb.finish()
    folder = tmp_path / "run" / "wandb"
    assert list(folder.glob("offline-run-*/files/media/images/samples_*.png"))
    (file,) = folder.glob("offline-run-*/run-*.wandb")
    data = file.read_bytes()
    assert b"flow-matching" in data and b"run" in data


class StopAt(Callback):
    def __init__(self, step: int):
        self.at = step

    def on_step(self, trainer: Trainer) -> None:
        if trainer.step == self.at:
            trainer.stop()


def test_stop_ends_with_checkpoint(here, tmp_path):
    """After the current step, without an exit code; the run resumes as an uninterrupted one."""
    config = schema.load(TINY_TRAIN[1], TINY_TRAIN[2:])
    accelerator = distributed.build_training_accelerator(config.train, tmp_path / "run")
    trainer = Trainer(FlowTask(config, accelerator), config, tmp_path / "run", accelerator, callbacks=[StopAt(3)])
    trainer.fit()
    assert trainer.step == 3 and not trainer.finished
    assert [path.name for path in checkpoint.list_checkpoints(tmp_path / "run" / "checkpoints")][-1] == "step_00000003"
    here("train", "-e", tmp_path / "run", "-r", "latest")
    assert read_metrics(tmp_path / "run" / "metrics.jsonl")[-1]["step"] == 4
