"""fit, the training in Python: the run is that of train.py."""

import shutil

import pytest
from conftest import TINY_TRAIN

from configs import loading
from configs.errors import UserError
from flow.sampling import locate, snapshot
from flow.training.fit import fit
from flow.training.logging import read_metrics
from scripts.dev import fault_injection


def configuration(*overrides: str):
    return loading.load(TINY_TRAIN[1], [*TINY_TRAIN[2:], *overrides])


def test_run_is_that_of_train_py(tiny_run, tmp_path):
    """To the bit, also where it was resumed; the configuration stays as it is."""
    first, config = configuration("train.steps=2"), configuration()
    assert fit(first, tmp_path / "run").step == 2 and first == configuration("train.steps=2")
    trainer = fit(config, tmp_path / "run", resume="latest")
    assert trainer.finished
    last = "checkpoints/step_00000004"
    assert fault_injection.compare(tiny_run / last, tmp_path / "run" / last) == []


def test_first_weights_and_evaluation(tiny_run, tmp_path):
    """As the configuration asks: weights of another run, and a validation loss."""
    config = configuration(
        f"train.init_from={tiny_run}", "train.steps=1", "optimizer.lr=1e-12", "evaluate.loss_every_steps=1",
        "evaluate.loss_samples=10", "data.args.split=train",
    )  # fmt: skip
    fit(config, tmp_path / "run")
    before, after = (snapshot.load(locate.find(run)).weights for run in (tiny_run, tmp_path / "run"))
    assert all((after[name] - weight).abs().max() < 1e-9 for name, weight in before.items())
    assert any("validation_loss" in row for row in read_metrics(tmp_path / "run/metrics.jsonl"))


def test_what_is_refused(tiny_run, tmp_path):
    for folder, resume, message in (
        (tiny_run, None, 'folder=.*: exists already; resume with resume="latest", or name another folder'),
        (tmp_path / "new", "latest", "resume=latest: there is no run in .*; start one without resume"),
        (tiny_run, "latest", "seed=5: the run in .* was started with 0, which resuming cannot change"),
    ):
        with pytest.raises(UserError, match=message):
            fit(configuration("seed=5"), folder, resume)


def test_resumed_checkpoint_is_of_the_folder(tiny_run, tmp_path):
    """A mistyped name is not the latest checkpoint, and that of another run would overwrite this one."""
    shutil.copytree(tiny_run, tmp_path / "run")
    for resume, message in (
        ("step_00000002x", "-r step_00000002x: there is no such folder; give `latest`, a run folder or a checkpoint folder"),
        (str(tiny_run / "checkpoints/step_00000004"), "resume=.*step_00000004: is no checkpoint of .*; name one"),
    ):
        with pytest.raises(UserError, match=message):
            fit(configuration(), tmp_path / "run", resume)


def test_values_set_in_python_are_checked(tmp_path):
    """As those of a file, before anything is written: a run with a configuration that nothing reads could not be used."""
    for section, name, value, message in (
        ("train", "steps", -3, "train.steps=-3: must be at least 1"),
        ("train", "batch_size", "many", "config: train.batch_size: .*many"),
        ("optimizer", "name", "sgd", "optimizer.name=sgd: .*adamw"),
    ):
        config = configuration()
        setattr(getattr(config, section), name, value)
        with pytest.raises(UserError, match=message):
            fit(config, tmp_path / "run")
    with pytest.raises(UserError, match=r"config='configs/digits\.yaml': must be a configuration"):
        fit("configs/digits.yaml", tmp_path / "run")
    assert not (tmp_path / "run").exists()
