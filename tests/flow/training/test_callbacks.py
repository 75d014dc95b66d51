"""A training that is stopped by a callback."""

import pytest
from conftest import TINY_TRAIN

from configs import loading
from flow.training import checkpoint
from flow.training.fit import fit
from flow.training.trainer import Callback, Trainer
from scripts.dev import fault_injection


class StopAt(Callback):
    """Stops a run in one of the hooks of a step, and keeps the steps of the checkpoints."""

    def __init__(self, hook: str, step: int):
        self.at, self.saved = (hook, step), []

    def reach(self, hook: str, trainer: Trainer) -> None:
        if (hook, trainer.step) == self.at:
            trainer.stop()

    def on_start(self, trainer: Trainer) -> None:
        self.reach("on_start", trainer)

    def on_step(self, trainer: Trainer) -> None:
        self.reach("on_step", trainer)

    def on_checkpoint(self, trainer: Trainer, path) -> None:
        self.saved.append(trainer.step)
        self.reach("on_checkpoint", trainer)

    def on_preview(self, trainer: Trainer, picture) -> None:
        self.reach("on_preview", trainer)


@pytest.mark.parametrize(
    ("hook", "step", "saved"),
    [("on_start", 0, [0]), ("on_step", 3, [2, 3]), ("on_checkpoint", 2, [2]), ("on_preview", 3, [2, 3])],
)
def test_stop_ends_with_checkpoint(here, tiny_run, tmp_path, hook, step, saved):
    """One of the current step, whatever hook it comes from, without an exit code; the run resumes as an uninterrupted one."""
    run = tmp_path / "run"
    config = loading.load(TINY_TRAIN[1], [*TINY_TRAIN[2:], "train.sample_every_steps=3"])
    callback = StopAt(hook, step)
    trainer = fit(config, run, callbacks=[callback])
    assert trainer.step == step and not trainer.finished and callback.saved == saved
    assert [path.name for path in checkpoint.list_checkpoints(run / "checkpoints")][-1] == f"step_{step:08d}"
    here("train", "-e", run, "-r", "latest", "train.sample_every_steps=0")
    assert fault_injection.compare(tiny_run / "checkpoints/step_00000004", run / "checkpoints/step_00000004") == []
    preview, rows = "samples/step_00000004.png", "metrics.jsonl"
    assert (run / preview).read_bytes() == (tiny_run / preview).read_bytes()
    assert fault_injection.losses(run / rows) == fault_injection.losses(tiny_run / rows)
