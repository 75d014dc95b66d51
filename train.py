"""Train a flow matching model: `accelerate-launch train.py -c configs/mnist.yaml`."""

from collections.abc import Sequence
from pathlib import Path

from configs.schema import Config
from flow.runtime import cli, flags
from flow.runtime.errors import cli_main
from flow.training.flow_task import FlowTask
from flow.training.run_dir import checkpoint_to_resume, locked_run
from flow.training.trainer import Callback, Trainer
from flow.training.validation import ValidationLoss

EXAMPLES = """\
  accelerate-launch train.py -c configs/mnist.yaml
  accelerate-launch train.py -c configs/mnist.yaml -e runs/wide model.args.width=96 train.steps=20_000
  accelerate-launch train.py -c configs/mnist.yaml -r latest
  accelerate-launch --multi_gpu --num_processes 8 train.py -c configs/cifar10.yaml -mp auto"""


def parse_args():
    return flags.parse_training(flags.add_resume_flag(cli.Parser(__doc__, EXAMPLES)))


def main(callbacks: Sequence[Callback] = ()) -> None:
    """callbacks: beside those of the configuration (docs/extending.md)."""
    args = parse_args()
    with locked_run(args, Config) as (folder, config, accelerator):
        # Whatever is wrong with the configuration comes out here, before anything is written.
        task = FlowTask(config, accelerator, resuming=bool(args.resume))
        resume_path = checkpoint_to_resume(args.resume, folder, config) if args.resume else None
        if resume_path is None:
            task.load_init_weights()
        Trainer(task, config, folder, accelerator, resume_path, [*evaluation_callbacks(task, folder), *callbacks]).fit()
        accelerator.end_training()


def evaluation_callbacks(task: FlowTask, folder: Path) -> list[Callback]:
    """What the section `evaluate` of the configuration asks for."""
    callbacks: list[Callback] = []
    if task.config.evaluate.loss_every_steps:
        callbacks.append(ValidationLoss(task))
    if task.config.evaluate.every_steps:
        from flow.training.evaluation import EvaluateSnapshots  # extractors and figures take seconds to import

        callbacks.append(EvaluateSnapshots(task, folder))
    return callbacks


if __name__ == "__main__":
    cli_main(main)
