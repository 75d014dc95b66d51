"""Evaluation during training: the rows of evaluate.py, the best snapshot, the validation loss; the weights stay the same."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from conftest import DROPOUT, TINY_TRAIN, run_here
from safetensors.torch import load_file
from torch import Tensor, nn

import datasets
from configs import loading
from flow.evaluation import metrics, results
from flow.model import FlowModel
from flow.path import LinearPath
from flow.runtime import lock
from flow.sampling import snapshot
from flow.training import checkpoint
from flow.training.logging import read_metrics
from flow.training.validation import by_time, validation_losses
from scripts.dev import fault_injection
from scripts.doctor.configuration import num_checkpoints

TRAIN = [*TINY_TRAIN, DROPOUT, "data.args.split=train", "train.keep_checkpoints=0"]
EVALUATE = [
    "evaluate.every_steps=3", "evaluate.n_samples=80", "evaluate.sampling_steps=1", "evaluate.guidance_scale=2",
    "evaluate.feature_extractor=digits", "evaluate.keep_best=fid", "evaluate.loss_every_steps=2", "evaluate.loss_samples=120",
    "evaluate.metrics=[fid, accuracy, memorization]",
]  # fmt: skip
SAME = ["--methods", "heun", "--sampling_steps", "1", "--guidance_scale", "2", "--n_samples", "80"]
SAME += ["--feature_extractor", "digits", "--metrics", "fid", "accuracy", "memorization"]
FD = "FD-digits"


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """Checkpoints after steps 2, 3 and 4; rows for 3 and 4; validation losses at 2 and 4."""
    folder = tmp_path_factory.mktemp("evaluation") / "run"
    run_here("train", *TRAIN, *EVALUATE, "-e", folder, f"data.root={folder.parent}")
    return folder


@pytest.fixture
def copy(run, tmp_path) -> Path:
    return shutil.copytree(run, tmp_path / "run")


def rows_of_snapshots(folder: Path) -> list[dict]:
    """The rows of snapshots, without the time they took."""
    rows = [json.loads(line) for line in (folder / "evaluation/results.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k != "seconds"} for row in rows if not results.is_control(row)]


def drop_last_row(file: Path) -> None:
    file.write_text("\n".join(file.read_text().splitlines()[:-1]) + "\n")


def test_rows_losses_and_best_snapshot(run):
    assert [p.name for p in checkpoint.list_checkpoints(run / "checkpoints")] == [f"step_{k:08d}" for k in (2, 3, 4)]
    assert num_checkpoints(loading.parse((run / "config.yaml").read_text())) == 3  # as the doctor says
    assert {p.name for p in (run / "evaluation").iterdir()} == {
        "results.jsonl", "results.csv", "results.md", "snapshots.png", "memorization.png",
    }  # fmt: skip
    rows, logged = rows_of_snapshots(run), read_metrics(run / "metrics.jsonl")
    assert [(row["weights"], row["images"], row["n"]) for row in rows] == [("run@3", 96, 80), ("run@4", 128, 80)]
    columns = {row["step"]: row for row in logged if FD in row}
    assert {step: row[FD] for step, row in columns.items()} == {3: rows[0]["metrics"][FD], 4: rows[1]["metrics"][FD]}
    assert [row["step"] for row in logged if "validation_loss" in row] == [2, 4]
    assert len([key for key in logged[0] if key.startswith("validation_loss_t_0.")]) == 10
    assert [row["step"] for row in logged if "loss" in row] == [2, 4]
    best = min(rows, key=lambda row: row["metrics"][FD])
    assert snapshot.load(run / "best.safetensors").images == best["images"]
    held_out = datasets.build("digits", None, {"split": "test"})
    for row in (row for row in logged if "validation_loss" in row):
        model = snapshot.load(run / f"snapshots/step_{row['step']:08d}.safetensors").model()
        losses = validation_losses(Accelerator(cpu=True), model, held_out, 120, 0, 100)
        assert row["validation_loss"] == pytest.approx(losses.mean().item(), rel=1e-6)
    log = (run / "log.txt").read_text()
    assert f"step 3: {FD} " in log and f"step 3: best {FD} so far, the snapshot is kept as {run}/best.safetensors" in log


def test_evaluate_adds_what_is_missing(here, copy, run):
    """Of the three snapshots the row of step 3 is there; that of step 4 comes out as in the training."""
    drop_last_row(copy / "evaluation/results.jsonl")
    printed = here("evaluate", "--weights", copy, "--snapshots", "all", *SAME, f"data.root={run.parent}")
    (third, fourth), rows = rows_of_snapshots(run), rows_of_snapshots(copy)
    assert rows[0] == third and [row["weights"] for row in rows[1:]] == ["run@2", "run@4"]
    assert rows[2]["identity"] == fourth["identity"] and rows[2]["metrics"] == pytest.approx(fourth["metrics"], rel=1e-6)
    names = [line.split("|")[1].strip() for line in printed.splitlines() if line.startswith("| run@")]
    assert names == ["run@2", "run@3", "run@4"]
    here("evaluate", "--weights", copy / "best.safetensors", *SAME)
    assert rows_of_snapshots(copy) == rows


def test_kill_before_row_computes_it(here, copy, run):
    """Killed after the last checkpoint and before its row: the row comes after the resume, the one before it does not again."""
    drop_last_row(copy / "evaluation/results.jsonl")
    drop_last_row(copy / "metrics.jsonl")
    shutil.copy(run / "snapshots/step_00000003.safetensors", copy / "best.safetensors")
    here("train", "-e", copy, "-r", "latest")
    assert rows_of_snapshots(copy) == rows_of_snapshots(run)
    assert fault_injection.losses(copy / "metrics.jsonl") == fault_injection.losses(run / "metrics.jsonl")
    assert (copy / "best.safetensors").read_bytes() == (run / "best.safetensors").read_bytes()


@pytest.mark.slow
def test_kill_before_log_logs_the_row(here, copy, run):
    drop_last_row(copy / "metrics.jsonl")
    here("train", "-e", copy, "-r", "latest")
    assert rows_of_snapshots(copy) == rows_of_snapshots(run)
    assert fault_injection.losses(copy / "metrics.jsonl") == fault_injection.losses(run / "metrics.jsonl")


def test_resume_and_evaluation_leave_the_weights(here, copy, run, tmp_path):
    """The last step after a resume, and the whole training without evaluation, to the bit; the network has dropout."""
    shutil.rmtree(copy / "checkpoints/step_00000004")
    here("train", "-e", copy, "-r", "latest")
    assert fault_injection.compare(copy / "checkpoints", run / "checkpoints") == []
    assert rows_of_snapshots(copy) == rows_of_snapshots(run)
    here("train", *TRAIN, "-e", tmp_path / "plain")
    for name in ("model.safetensors", "ema.safetensors"):
        a, b = (load_file(folder / "checkpoints/step_00000004" / name) for folder in (run, tmp_path / "plain"))
        assert all(torch.equal(a[key], b[key]) for key in a)


def test_best_snapshot_outlives_worse_ones(here, copy):
    """Step 3 has a distance that step 4 does not reach; its snapshot is pruned, the best file stays."""
    shutil.rmtree(copy / "checkpoints/step_00000004")
    shutil.copy(copy / "snapshots/step_00000003.safetensors", copy / "best.safetensors")
    file = copy / "evaluation/results.jsonl"
    drop_last_row(file)
    lines = file.read_text().splitlines()
    row = json.loads(lines[-1])
    row["metrics"][FD] = 0.5
    file.write_text("\n".join([*lines[:-1], json.dumps(row)]) + "\n")
    here("train", "-e", copy, "-r", "latest", "train.keep_snapshots=1")
    assert [p.name for p in (copy / "snapshots").iterdir()] == ["step_00000004.safetensors"]
    assert snapshot.load(copy / "best.safetensors").step == 3


def test_best_of_an_abandoned_training_is_replaced(here, copy):
    """The run is resumed from before its best snapshot and reaches the same number of images with other weights."""
    best = copy / "best.safetensors"
    shutil.copy(copy / "snapshots/step_00000004.safetensors", best)
    for step in ("step_00000003", "step_00000004"):
        shutil.rmtree(copy / "checkpoints" / step, ignore_errors=True)
    assert sorted(p.name for p in (copy / "checkpoints").iterdir()) == ["step_00000002"]
    file = copy / "evaluation/results.jsonl"
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    for row in rows:
        row["metrics"] |= {FD: 0.01} if row.get("images") == 128 else {}  # better than what follows
    file.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    before = best.read_bytes()
    here("train", "-e", copy, "-r", "latest", "optimizer.lr=1e-3", "evaluate.every_steps=4")
    assert best.read_bytes() != before and snapshot.load(best).step == 4


def test_best_by_other_settings_is_set_aside(here, copy):
    """Nobody knows whether it is better than what the settings of the resume choose."""
    shutil.rmtree(copy / "checkpoints/step_00000004")
    shutil.copy(copy / "snapshots/step_00000004.safetensors", copy / "best.safetensors")
    here("train", "-e", copy, "-r", "latest", "evaluate.seed=1")
    aside = copy / "snapshots/best_before_step_00000003.safetensors"
    assert snapshot.load(aside).step == 4 and f"it is now {aside}" in (copy / "log.txt").read_text()
    rows = {row["images"]: row for row in rows_of_snapshots(copy) if row["identity"].get("seed") == 1}
    best = min(rows.values(), key=lambda row: row["metrics"][FD])
    assert len(rows) == 2 and snapshot.load(copy / "best.safetensors").images == best["images"]


def test_two_processes_find_the_same_numbers(group, tmp_path, run):
    """With weights that do not move, whatever the precision of the gradients between the processes."""
    still = [*TRAIN, *EVALUATE, "optimizer.lr=1e-30", f"data.root={run.parent}"]
    one, two = tmp_path / "one", tmp_path / "two"
    run_here("train", *still, "-e", one)
    group("train", *still, "train.ddp_comm_hook=fp16", "-e", two)
    losses = [[row for row in fault_injection.losses(r / "metrics.jsonl") if "validation_loss" in row] for r in (one, two)]
    assert losses[0] == losses[1] and len(losses[0]) == 2
    for a, b in zip(rows_of_snapshots(one), rows_of_snapshots(two), strict=True):
        assert a["metrics"] == pytest.approx(b["metrics"], rel=1e-6)


class ZeroFlowMap(nn.Module):
    """A flow map that predicts 0, and remembers times and labels."""

    two_times, num_classes = True, 10

    def __init__(self):
        super().__init__()
        self.times: list[Tensor] = []
        self.labels: list[Tensor] = []

    def forward(self, x: Tensor, t: Tensor, y: Tensor | None = None, t_next: Tensor | None = None) -> Tensor:
        assert t_next is None or torch.equal(t, t_next)
        self.times.append(t)
        self.labels.append(y)
        return torch.zeros_like(x)


def test_validation_loss_of_zero():
    """The velocity of a predictor of 0 has the error |x1 - x0|^2, whose mean is that of 1 + |x1|^2, at all times."""
    data = datasets.build("digits", None, {"split": "test"})
    net = ZeroFlowMap()
    losses = validation_losses(Accelerator(cpu=True), FlowModel(net, LinearPath(), data.image_shape), data, 2990, 0, 100)
    x1 = data.images.double() / 127.5 - 1
    assert losses.mean().item() == pytest.approx(1 + x1.square().mean().item(), rel=0.01)
    labels = torch.cat(net.labels)
    assert labels.max() == 9  # none is dropped, which would be 10
    assert torch.bincount(labels).tolist() == pytest.approx((torch.bincount(data.labels) * 10).tolist(), abs=10)
    times = torch.cat(net.times)
    assert torch.equal((times * 2990).floor().int(), torch.arange(2990).int())
    assert [len(part) for part in by_time(losses)] == [299] * 10
    bins = list(by_time(torch.arange(15)))
    assert torch.cat(bins).tolist() == list(range(15)) and all(len(part) for part in bins)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["evaluate.keep_best=fid"], "keep_best=fid: must be null where evaluate.every_steps is 0"),
        (["evaluate.every_steps=2", "evaluate.metrics=[fd]"], "evaluate.metrics=['fd']: unknown metric 'fd'; choose from"),
        (["evaluate.every_steps=2", "evaluate.feature_extractor=x"], "evaluate.feature_extractor=x: unknown; choose one of"),
        ([*EVALUATE, "evaluate.feature_layer=x"], "evaluate.feature_layer=x: digits has no such layer"),
        ([*EVALUATE, "evaluate.feature_weights=/none"], "evaluate.feature_weights=/none: there is no such file"),
        ([*EVALUATE, "evaluate.keep_best=mine"], "a column of your own says in METRICS which values are better"),
        ([*EVALUATE, "evaluate.metrics=[]"], "evaluate.metrics=[]: name at least one of fid, "),
        ([*EVALUATE, "evaluate.keep_best=recall"], "keep_best=recall: evaluate.metrics=['fid', 'accuracy', 'memo"),
        (
            ["evaluate.loss_every_steps=2", "flow.coupling=aligned", "flow.source.name=digits",
             "flow.source.args={split: train}"],
            "evaluate.loss_every_steps=2: must be 0 with flow.coupling=aligned",
        ),
        (["evaluate.loss_every_steps=2", "data.args.split=all"], "evaluate.loss_every_steps=2: data.name=digits with data."),
    ],
)  # fmt: skip
def test_mistakes_in_the_configuration(error, tmp_path, run, settings, message):
    assert message in error("train", *TRAIN, "-e", tmp_path / "run", f"data.root={run.parent}", *settings)


@pytest.mark.parametrize(("stored", "kept"), [(0.0, False), (1.1, True)])
def test_best_accuracy_is_the_largest(here, copy, stored, kept):
    """Of a score, not of a distance: the snapshot with the larger value stays."""
    table_file, best = copy / "evaluation/results.jsonl", copy / "best.safetensors"
    rows = [json.loads(line) for line in table_file.read_text().splitlines()]
    first = next(row for row in rows if row["weights"] == "run@3")
    first["metrics"]["accuracy"] = stored
    table_file.write_text("".join(json.dumps(row) + "\n" for row in rows if row["weights"] != "run@4"))
    shutil.copy(copy / "snapshots/step_00000003.safetensors", best)
    shutil.rmtree(copy / "checkpoints/step_00000004")
    here("train", "-e", copy, "-r", "latest", "evaluate.keep_best=accuracy")
    assert snapshot.load(best).images == (96 if kept else 128)


@pytest.mark.parametrize(("direction", "step"), [("higher", 4), ("lower", 2)])
def test_best_by_a_metric_of_ones_own(here, monkeypatch, tmp_path, run, direction, step):
    """Its entry says which values are better; they may be plain numbers."""
    values = iter((0, 1.5, 2.5))  # of real images, and after steps 2 and 4
    monkeypatch.setitem(metrics.METRICS, "mine", metrics.Metric(lambda c: {"mine": next(values)}, {"mine": direction}))
    keys = ["evaluate.every_steps=2", "evaluate.loss_every_steps=0", "evaluate.metrics=[mine]", "evaluate.keep_best=mine"]
    here("train", *TRAIN, *EVALUATE, *keys, "-e", tmp_path / "run", f"data.root={run.parent}")
    assert [row["metrics"] for row in rows_of_snapshots(tmp_path / "run")] == [{"mine": 1.5}, {"mine": 2.5}]
    assert snapshot.load(tmp_path / "run/best.safetensors").step == step


def test_row_beside_a_writer_of_the_table(here, copy, monkeypatch):
    """An evaluate.py that holds the folder: the row is stored and logged, and the next table has it."""
    drop_last_row(copy / "evaluation/results.jsonl")
    shutil.rmtree(copy / "checkpoints/step_00000004")
    before = (copy / "evaluation/results.md").read_text()
    monkeypatch.setattr(lock, "PATIENCE_SECONDS", 0.1)
    with lock.folder(copy / "evaluation"):
        said = here("train", "-e", copy, "-r", "latest")
    assert "note: the row is in results.jsonl, not yet in the table" in said
    assert [row["weights"] for row in rows_of_snapshots(copy)] == ["run@3", "run@4"]
    assert (copy / "evaluation/results.md").read_text() == before


def test_best_by_a_column_that_samples_lack(error, tmp_path, run):
    """Real images have classes, an unconditional network has none: refused before the first step."""
    plain = ["model.args.num_classes=null", *EVALUATE, "evaluate.guidance_scale=1", "evaluate.keep_best=accuracy"]
    plain += [f"data.root={run.parent}"]
    assert "keep_best=accuracy: evaluate.metrics=" in error("train", *TRAIN, *plain, "-e", tmp_path / "run")
    assert not list((tmp_path / "run" / "checkpoints").glob("*"))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--snapshots", "5"], "--snapshots 5: must be all, or steps among 2, 3, 4"),
        (["--snapshots", "last"], "--snapshots last: must be all, or steps among 2, 3, 4"),
        (["--snapshots", "all", "77"], "--snapshots 77: must be all, or steps among 2, 3, 4"),
        (["--snapshots", "all", "--time_grid", "optimized"], "--snapshots: does not go with --time_grid optimized"),
    ],
)
def test_mistakes_with_snapshots(error, run, flags, message):
    assert message in error("evaluate", "--weights", run, *flags)
    assert "is neither a run folder" in error("evaluate", "--weights", run / "best.safetensors", "--snapshots", "all")
