"""Evaluation during training: rows of evaluate.py for the averaged weights, and the snapshot with the best value."""

import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path

from configs.errors import UserError, did_you_mean
from flow.evaluation import control, metrics, results, runner, snapshots, table
from flow.evaluation.checks import check_evaluation
from flow.evaluation.entries import aggregate
from flow.evaluation.frechet import can_extrapolate
from flow.runtime import distributed, files, lock, messages, step_names
from flow.runtime.errors import error_context
from flow.sampling.conditions import conditions_in_turn
from flow.sampling.locate import BEST_FILE, EMA_FILE
from flow.sampling.settings import SamplerSettings, validate
from flow.solvers import SOLVERS
from flow.training import trackers
from flow.training.flow_task import FlowTask
from flow.training.logging import read_metrics
from flow.training.trainer import Callback, Trainer

DISTANCES = ("FID", "FD-", "KID", "KD-", "SW2", "MMD", "energy")  # beginnings of their columns


class EvaluateSnapshots(Callback):
    """A row of RUN/evaluation for the snapshot of every evaluate.every_steps and of the last step.

    What is evaluated has just been saved: a run that is killed before the row is complete computes it when it is resumed. The
    row is that of evaluate.py with the same settings, and neither of the two computes it again.
    """

    def __init__(self, task: FlowTask, folder: Path):
        """folder: of the run.

        Raises:
            UserError: that names the key, for settings that do not fit the network, the data or each other.
        """
        self.task, self.settings = task, task.config.evaluate
        self.checkpoint_every_steps = self.settings.every_steps
        settings, sampler, captions_of = settings_of(task, folder)
        with _keys_for_flags():
            self.evaluator = snapshots.SnapshotEvaluator.build(
                settings, task.accelerator, folder / "evaluation", task.config, task.space, task.model, task.data.class_names,
                [sampler], captions_of, by_frequency=True,
            )  # fmt: skip
        name = self.settings.keep_best
        self.best_column = self.evaluator.evaluation.extractor.distance_name if name == "fid" else name
        self.captions = "plain" if captions_of else None

    def on_start(self, trainer: Trainer) -> None:
        """The row of real images, whose columns show whether evaluate.keep_best is one."""
        row = control.add_control(self.evaluator.evaluation)
        self._check_best_column(self._columns_of_samples(list(row["metrics"])) if row else None)

    def on_checkpoint(self, trainer: Trainer, path: Path) -> None:
        if trainer.interrupted or not (trainer.finished or trainer.is_due(self.settings.every_steps)):
            return
        start = time.perf_counter()
        main = trainer.accelerator.is_main_process
        images = trainer.step * trainer.config.train.batch_size
        subject = {"weights": f"{trainer.folder.name}@{trainer.step}", "images": images, "captions": self.captions}
        digest = files.sha256(path / EMA_FILE) if main else ""
        with trainer.ema.average_parameters() as averaged:
            model = self.task.model_with(averaged)
            try:
                rows = self.evaluator.evaluate(model, digest, subject)
            except UserError as error:
                without = "evaluate.every_steps=0" + (" evaluate.keep_best=null" if self.best_column else "")
                raise UserError(f"{error}; to continue without evaluation set {without}") from error
        row, is_new = rows[0] if rows else (None, False)
        self._check_best_column(list(row["metrics"]) if row else None)
        if row is None:
            return
        if is_new:
            seconds = messages.duration(time.perf_counter() - start)
            trainer.logger.info(f"step {trainer.step}: {table.summary(row) or 'no metric has a value'}; evaluated in {seconds}")
        values = {name: value for name, value in row["metrics"].items() if value is not None}
        if is_new or not _is_logged(trainer, values):  # a kill may have come in between
            trainer.logger.log(trainer.step, {**values, "images": images})
            lines = table.metric_cells(aggregate(results.read(self.evaluator.evaluation.out)))
            trackers.log_table(trainer.accelerator, "evaluation", trainer.step, lines, table.markdown(lines))
        self._write_report(trainer)
        if self.best_column:
            self._keep_best(trainer, path / EMA_FILE, row, self.best_column)

    def _write_report(self, trainer: Trainer) -> None:
        """Table and figures; left to an evaluate.py that is writing there, as its own report will have the row."""
        try:
            with lock.folder(self.evaluator.evaluation.out):
                self.evaluator.evaluation.write_report()
        except UserError as error:
            trainer.logger.info(f"note: the row is in results.jsonl, not yet in the table: {error}")

    def _keep_best(self, trainer: Trainer, snapshot: Path, row: dict, column: str) -> None:
        """Make the snapshot best.safetensors where its value is better than that of the snapshot there."""
        best = trainer.folder / BEST_FILE
        before = self._row_of(best, row) if best.exists() else None
        value = row["metrics"][column]
        if best.exists() and (before is None or column not in before["metrics"]):
            names = (f"best_before_{step_names.name_of(trainer.step)}{f'_{k}' if k > 1 else ''}.safetensors" for k in count(1))
            aside = next(path for name in names if not (path := trainer.folder / "snapshots" / name).exists())
            best.rename(aside)  # nobody knows which of the two is better
            trainer.logger.info(f"note: {best.name} was chosen by other settings of the evaluation; it is now {aside}")
            before = None
        # One of as many images or more, with other weights, is of a training that was resumed from before it.
        same = before and before["identity"]["weights_sha256"] == row["identity"]["weights_sha256"]
        if before and (same or before["images"] < row["images"]):
            previous = before["metrics"][column]
            if not (value > previous if metrics.directions().get(column) == "higher" else value < previous):
                return
        files.link(snapshot, best)
        was = f" (before: {before['weights']})" if before else ""
        trainer.logger.info(f"step {trainer.step}: best {column} so far{was}, the snapshot is kept as {best}")

    def _row_of(self, snapshot: Path, like: dict) -> dict | None:
        """The row of a snapshot that was evaluated as another one was."""
        identity = {**like["identity"], "weights_sha256": files.sha256(snapshot)}
        return results.find(self.evaluator.evaluation.out, {**like, "identity": identity})

    def _columns_of_samples(self, columns: list[str]) -> list[str]:
        """The columns of samples, by those of real images: these may be too few for an extrapolation, have no Inception Score
        and, beside another extractor, no class accuracy, and have classes where the network has none."""
        extractor, requested = self.evaluator.evaluation.extractor, self.settings.metrics
        if self.task.net.num_classes is None and not self.captions:
            columns = [name for name in columns if name != "accuracy" and not results.is_class_column(name)]
        elif "accuracy" in requested and extractor.second_net is not None and "accuracy" not in columns:
            columns = [*columns, "accuracy"]
        if "isc" in requested and extractor.isc_layer:
            columns = [*columns, "IS"]
        extrapolates = "fd_inf" in requested and not self.task.space.is_points
        if extrapolates and can_extrapolate(self.settings.n_samples, self.evaluator.evaluation.dimension):
            columns = [*columns, f"{extractor.distance_name}_inf"]
        return columns

    def _check_best_column(self, columns: list[str] | None) -> None:
        """Raises UserError on every process where the column of evaluate.keep_best is not among these, on the main process;
        None: it does not know them."""
        settings = self.settings

        def check() -> None:
            if self.best_column and columns is not None and self.best_column not in columns:
                raise UserError(
                    f"evaluate.keep_best={settings.keep_best}: evaluate.metrics={settings.metrics} gives no such column here; "
                    f"choose from {', '.join(['fid', *columns])}"
                )

        distributed.decided_by_main(check)


def settings_of(task: FlowTask, folder: Path) -> tuple[runner.EvaluationSettings, SamplerSettings, list[list[str]] | None]:
    """(what is measured, how images are made, captions by class) by the section evaluate of the configuration; `folder` is that
    of the run.

    Raises:
        UserError: that names the key, for what does not fit the network, the data or each other.
    """
    evaluate = task.config.evaluate
    if not evaluate.metrics:
        raise UserError(f"evaluate.metrics=[]: name at least one of {', '.join(metrics.METRICS)}")
    if unknown := [name for name in evaluate.metrics if name not in metrics.METRICS]:
        raise UserError(
            f"evaluate.metrics={evaluate.metrics}: unknown metric {unknown[0]!r}; choose from {', '.join(metrics.METRICS)}"
        )
    best = evaluate.keep_best
    columns = ("fid", *metrics.directions())
    if best and best not in columns and not best.startswith(DISTANCES):
        own = "a column of your own says in METRICS which values are better (docs/extending.md#a-metric)"
        raise UserError(f"evaluate.keep_best={best}: must be a distance or one of {', '.join(columns)}; {own}")
    if evaluate.sampling_method not in SOLVERS:
        hint = did_you_mean(evaluate.sampling_method, list(SOLVERS))
        raise UserError(f"evaluate.sampling_method={evaluate.sampling_method}: there is no such solver.{hint}")
    captions_of = snapshots.captions_by_class(None, None, task.accelerator, task.config, task.net)
    labels, prompts = conditions_in_turn(None, captions_of)
    sampler = SamplerSettings(
        evaluate.sampling_method, evaluate.sampling_steps, evaluate.guidance_scale, seed=evaluate.seed, labels=labels,
        prompts=prompts,
    )  # fmt: skip
    with error_context("evaluate"):
        validate(sampler, task.model)
    settings = runner.EvaluationSettings(
        owner=str(folder), n_samples=evaluate.n_samples, batch_size=evaluate.batch_size,
        feature_extractor=evaluate.feature_extractor, feature_layer=evaluate.feature_layer,
        feature_weights=Path(evaluate.feature_weights) if evaluate.feature_weights else None,
        reference=evaluate.reference, metrics=tuple(evaluate.metrics),
    )  # fmt: skip
    return settings, sampler, captions_of


def check_start(task: FlowTask, folder: Path) -> None:
    """Whether an evaluation during training can start: everything but the features of the reference, which take long.

    Raises:
        UserError: as `EvaluateSnapshots` does.
    """
    settings, _, _ = settings_of(task, folder)
    with _keys_for_flags():
        check_evaluation(settings, task.accelerator, task.config, task.space.decoded_shape, task.model.source)


def _is_logged(trainer: Trainer, values: dict[str, float]) -> bool:
    """Whether metrics.jsonl has these columns at this step."""
    rows = read_metrics(trainer.logger.metrics_file) if trainer.logger.metrics_file.exists() else []
    return any(row["step"] == trainer.step and values.keys() <= row.keys() for row in rows)


@contextmanager
def _keys_for_flags() -> Iterator[None]:
    """Errors that name a flag of evaluate.py name the key instead."""
    try:
        yield
    except UserError as error:
        message = str(error).replace("allow that with --allow_remote_code", "only evaluate.py allows that, with a flag")
        message = re.sub(r"^(evaluate: )?--(feature_\w+|reference|metrics) ", r"evaluate.\2=", message)
        raise UserError(re.sub(r"--(feature_\w+|reference)", r"evaluate.\1", message)) from error
