"""Train a flow matching model: `accelerate-launch train.py -c configs/mnist.yaml`."""

from collections.abc import Sequence

from configs.schema import Config
from flow.runtime import cli, flags
from flow.runtime.errors import cli_main
from flow.training.fit import fit_locked
from flow.training.run_dir import locked_run
from flow.training.trainer import Callback

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
        fit_locked(config, folder, accelerator, args.resume, callbacks)


if __name__ == "__main__":
    cli_main(main)
