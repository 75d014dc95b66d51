"""The folder of a run: what resuming cannot change."""

import shutil

from conftest import TINY_TRAIN


def test_weights_that_began_a_run_stay(here, error, tiny_run, tmp_path):
    """Where there is a checkpoint others would be recorded and not read; before the first one they are read."""
    run, without_checkpoint = tmp_path / "run", tmp_path / "without_checkpoint"
    shutil.copytree(tiny_run, run)
    before = (run / "config.yaml").read_text()
    last_checkpoint = run / "checkpoints" / "step_00000004"
    for given in ([], TINY_TRAIN):  # with the stored configuration, and with one of -c
        line = error("train", *given, "-e", run, "-r", "latest", f"train.init_from={tiny_run}")
        assert (
            f"train.init_from={tiny_run}: the checkpoint {last_checkpoint} was made with None, which resuming cannot change"
            in line
        )
    assert (run / "config.yaml").read_text() == before
    shutil.copytree(tiny_run, without_checkpoint, ignore=shutil.ignore_patterns("checkpoints", "snapshots", "metrics.jsonl"))
    here("train", "-e", without_checkpoint, "-r", "latest", f"train.init_from={tiny_run}", "train.steps=1")
    assert f"init_from: {tiny_run}" in (without_checkpoint / "config.yaml").read_text()
