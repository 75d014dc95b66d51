"""The training of a flow from a configuration: what train.py does, and the same in Python."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path

from accelerate import Accelerator

from configs.errors import UserError
from configs.schema import Config
from flow.training import checkpoint, run_dir
from flow.training.flow_task import FlowTask
from flow.training.trainer import Callback, Trainer
from flow.training.validation import ValidationLoss


def fit(config: Config, folder: str | Path, resume: str | None = None, callbacks: Sequence[Callback] = ()) -> Trainer:
    """Train `config` in a run folder, as `train.py -c ... -e FOLDER` does; in a process group every process calls it.

    Args:
        config: of `configs.loading.load`; it stays as it is.
        folder: new or empty, or that of the run to resume.
        resume: "latest", or a checkpoint folder of the run.
        callbacks: beside those of the configuration (docs/extending.md).

    Raises:
        UserError: for what train.py refuses.

    Example:
        >>> fit(loading.load("configs/digits.yaml", ["train.steps=100"]), "runs/notebook")
    """
    with run_dir.locked(partial(run_dir.run_of_config, config, Path(folder), resume)) as (path, copy, accelerator):
        return fit_locked(copy, path, accelerator, resume, callbacks)


def fit_locked(
    config: Config, folder: Path, accelerator: Accelerator, resume: str | None, callbacks: Sequence[Callback]
) -> Trainer:
    """`fit` inside the lock of the folder."""
    if other := next((each for each in callbacks if not isinstance(each, Callback)), None):
        raise UserError(f"callbacks: {other!r:.60} is no flow.training.trainer.Callback; derive its class from that")
    # Whatever is wrong with the configuration comes out here, before anything is written.
    resume_path = run_dir.checkpoint_to_resume(resume, folder, config) if resume else None
    class_names = checkpoint.stored_class_names(resume_path) if resume_path else ()
    task = FlowTask(config, accelerator, resuming=bool(resume), stored_class_names=class_names)
    if resume_path is None:
        task.load_init_weights()
    trainer = Trainer(task, config, folder, accelerator, resume_path, [*evaluation_callbacks(task, folder), *callbacks])
    trainer.fit()
    accelerator.end_training()
    return trainer


def evaluation_callbacks(task: FlowTask, folder: Path) -> list[Callback]:
    """What the section `evaluate` of the configuration asks for."""
    callbacks: list[Callback] = []
    if task.config.evaluate.loss_every_steps:
        callbacks.append(ValidationLoss(task))
    if task.config.evaluate.every_steps:
        from flow.training.evaluation import EvaluateSnapshots  # extractors and figures take seconds to import

        callbacks.append(EvaluateSnapshots(task, folder))
    return callbacks
