"""Trackers: those of Accelerate by name, those of the project by its registry; sample grids."""

import importlib
import json
import shutil
import sqlite3
from importlib.util import find_spec
from types import SimpleNamespace

import pytest
from accelerate.tracking import GeneralTracker, on_main_process
from conftest import TINY_TRAIN

from configs.schema import Config
from flow.training import trackers
from flow.training.logging import read_metrics


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
        self.path.write_text(json.dumps({key: values[key] for key in ("seed", "data.root", "data.args")}) + "\n")

    @on_main_process
    def log(self, values, step=None, **kwargs):
        with open(self.path, "a") as file:
            file.write(json.dumps({"step": step, **values}) + "\n")

    @on_main_process
    def log_table(self, table_name, columns=None, data=None, step=None, **kwargs):
        self.path.with_name(f"{table_name}_{step}.json").write_text(json.dumps([columns, *data]))


EVALUATED = [
    "evaluate.every_steps=2", "evaluate.n_samples=80", "evaluate.feature_extractor=digits", "evaluate.sampling_steps=1",
    "evaluate.sampling_method=euler",
]  # fmt: skip
WITH_PREVIEW = [word for word in TINY_TRAIN if not word.startswith(("train.sample_every", "train.log_with"))]


def test_registered_tracker(here, monkeypatch, tmp_path):
    """One line of TRACKERS; it gets the configuration, without values of the environment, and the rows of metrics.jsonl."""
    monkeypatch.setenv("PLACE", str(tmp_path / "hunter2"))
    monkeypatch.setitem(trackers.TRACKERS, "json", JSONTracker)
    here("train", *TINY_TRAIN[:-4], "preview.n_samples=4", "preview.sampling_steps=1", "preview.guidance_scale=1",
         "-e", tmp_path / "run", "train.log_with=[json]", "data.root=${oc.env:PLACE}")  # fmt: skip
    first, *rows = map(json.loads, (tmp_path / "run" / "trackers.jsonl").read_text().splitlines())
    assert first == {"seed": 0, "data.root": "${oc.env:PLACE}", "data.args": "{}"} and rows == read_metrics(
        tmp_path / "run" / "metrics.jsonl"
    )


def test_unknown_tracker_is_one_line(error, monkeypatch, tmp_path):
    """It lists the valid names, those of the registry too."""
    monkeypatch.setitem(trackers.TRACKERS, "json", JSONTracker)
    line = error("train", *TINY_TRAIN, "-e", tmp_path / "run", "train.log_with=[json, foo]")
    assert "train.log_with=['json', 'foo']: unknown tracker 'foo'; choose from " in line and not (tmp_path / "run").exists()
    assert {"tensorboard", "wandb", "json"} <= set(line.partition("choose from ")[2].split(", "))


def test_tracker_without_its_package_is_one_line(error, tmp_path):
    absent = next((name for name in ("aim", "clearml", "dvclive", "swanlab") if not find_spec(name)), None)
    if absent is None:
        pytest.skip("every tracker is installed")
    line = error("train", *TINY_TRAIN, "-e", tmp_path / "run", f"train.log_with=[{absent}]")
    assert f"train.log_with=['{absent}']: the package of {absent} is not installed; pip install {absent}" in line


def test_table_of_the_evaluation(here, monkeypatch, tmp_path):
    """Each row adds a line to the table that a tracker with `log_table` gets."""
    monkeypatch.setitem(trackers.TRACKERS, "json", JSONTracker)
    here("train", *TINY_TRAIN, *EVALUATED, "-e", tmp_path / "run", "train.log_with=[json]")
    for step, names in ((2, ["run@2"]), (4, ["run@2", "run@4"])):
        columns, *rows = json.loads((tmp_path / "run" / f"evaluation_{step}.json").read_text())
        weights = [row[columns.index("weights")] for row in rows]
        assert [name for name in weights if not name.startswith("real")] == names
        assert all(row[columns.index("FD-digits")] for row in rows)


@pytest.mark.parametrize(("mode", "first_step", "has_id"), [("offline", 0, True), ("offline", 4, False), ("online", 4, True)])
def test_ids_of_wandb(monkeypatch, tmp_path, mode, first_step, has_id):
    """A part of a run that was resumed offline has none: sent under the id of the first part, it would replace that."""
    monkeypatch.setenv("WANDB_MODE", mode)
    (tmp_path / "wandb_id.txt").write_text("run-0123")
    settings: dict = {}
    accelerator = SimpleNamespace(
        is_main_process=True,
        log_with=["wandb"],
        trackers=[],
        init_trackers=lambda _, config, init_kwargs: settings.update(init_kwargs),
    )
    config = Config()
    config.train.log_with = ["wandb"]
    trackers.start(accelerator, tmp_path, config, first_step)
    assert ("id" in settings["wandb"]) == has_id


def test_tensorboard_has_everything(here, tmp_path):
    event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    here(
        "train", *WITH_PREVIEW, *EVALUATED, "-e", tmp_path / "run", "train.log_with=[tensorboard]", "train.sample_every_steps=2"
    )
    events = event_accumulator.EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    events.Reload()
    assert {"loss", "FD-digits"} <= set(events.Tags()["scalars"])
    assert [event.step for event in events.Images("samples")] == [2, 4]
    texts = [event.tensor_proto.string_val[0].decode() for event in events.Tensors("evaluation/text_summary")]
    assert len(texts) == 2 and "run@4" not in texts[0] and "| run@4" in texts[1]


def test_tensorboard_drops_abandoned_steps(here, tmp_path):
    """A run that is resumed from an earlier checkpoint has each of its steps once."""
    event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    run = tmp_path / "run"
    here("train", *WITH_PREVIEW, "-e", run, "train.log_with=[tensorboard]")
    shutil.rmtree(run / "checkpoints/step_00000004")
    here("train", "-e", run, "-r", "latest")
    events = event_accumulator.EventAccumulator(str(run / "tensorboard"))
    events.Reload()
    assert [event.step for event in events.Scalars("loss")] == [2, 4]


def test_wandb_has_everything(here, monkeypatch, tmp_path):
    """Offline. The numbers are in a file of wandb's own format, in which they stand as text."""
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    run = tmp_path / "run"
    here("train", *WITH_PREVIEW, *EVALUATED, "-e", run, "train.log_with=[wandb]", "train.sample_every_steps=2")
    wandb.finish()
    folder = run / "wandb"
    assert list(folder.glob("offline-run-*/files/media/images/samples_*.png"))
    tables = sorted(folder.glob("offline-run-*/files/media/table/evaluation_*.json"))
    assert len(tables) == 2 and all("FD-digits" in json.loads(path.read_text())["columns"] for path in tables)
    (file,) = folder.glob("offline-run-*/run-*.wandb")
    data = file.read_bytes()
    assert file.stem == f"run-{(run / 'wandb_id.txt').read_text()}"
    rows = read_metrics(run / "metrics.jsonl")
    numbers = [row[name] for row in rows for name in ("grad_norm_median", "FD-digits") if name in row]
    assert len(numbers) == 4 and all(text in data for text in [b"flow-matching", *(str(x).encode() for x in numbers)])


def test_trackio_has_everything(here, monkeypatch, tmp_path):
    """In a folder of its own; a resumed run goes on under its name."""
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    trackio = pytest.importorskip("trackio")
    run, flags = tmp_path / "run", ["train.log_with=[trackio]", "train.sample_every_steps=2"]
    here("train", *WITH_PREVIEW, *EVALUATED, "-e", run, *flags)
    here("train", "-e", run, "-r", "latest", "train.steps=6")
    (stored,) = trackio.Api().runs("flow-matching")
    assert stored.name.startswith("run-") and stored.config["train.batch_size"] == 32
    rows = importlib.import_module("trackio.sqlite_storage").SQLiteStorage.get_logs("flow-matching", stored.name)
    assert [row["step"] for row in rows if "loss" in row] == [2, 4, 6]
    tables = [row["evaluation"] for row in rows if "evaluation" in row]
    assert [table["_type"] for table in tables] == ["trackio.table"] * 3 and "FD-digits" in tables[0]["_value"][0]
    assert len(list(tmp_path.glob(f"trackio/media/flow-matching/{stored.name}/*/*.png"))) == 3


def test_trackio_keeps_runs_of_one_name_apart(here, monkeypatch, tmp_path):
    """A resumed run goes on in its own, not in the first of that name."""
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    pytest.importorskip("trackio")
    for folder in ("a", "b"):
        here("train", *WITH_PREVIEW, "-e", tmp_path / folder / "run", "train.log_with=[trackio]")
    here("train", "-e", tmp_path / "b" / "run", "-r", "latest", "train.steps=6")
    storage = importlib.import_module("trackio.sqlite_storage").SQLiteStorage
    for folder, steps in {"a": [2, 4], "b": [2, 4, 6]}.items():
        name = (tmp_path / folder / "run/trackio_name.txt").read_text()
        assert [row["step"] for row in storage.get_logs("flow-matching", name) if "loss" in row] == steps


def test_aim_names_the_run(here, tmp_path):
    """Its files are read by `aim up` alone, but for those of the names."""
    pytest.importorskip("aim")
    here("train", *WITH_PREVIEW, *EVALUATED, "-e", tmp_path / "run", "train.log_with=[aim]", "train.sample_every_steps=2")
    with sqlite3.connect(tmp_path / "run/.aim/run_metadata.sqlite") as base:
        names = base.execute("select run.name, experiment.name from run join experiment on experiment.id = experiment_id")
        assert names.fetchall() == [("run", "flow-matching")]
