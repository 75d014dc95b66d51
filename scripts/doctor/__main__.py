"""Checks machine and configuration before hours are spent: `python -m scripts.doctor -c configs/mnist.yaml [key=value ...]`.

Start it as the training would be started (`accelerate-launch ... -m scripts.doctor`). Each line is pass, warn or fail, with the
fix. The last ones come from a real run of train.py of a few steps, with a checkpoint and a preview, in a temporary folder:
seconds a step, memory, disk, and when the training would be over. Exit code 0 where nothing failed, else 2.
"""

import sys
import tempfile
from pathlib import Path

from configs import loading
from configs.errors import UserError
from flow.runtime import cli, commands, distributed, flags, messages
from flow.runtime.errors import cli_main
from flow.training.trackers import TRACKERS
from scripts.doctor import configuration, machine
from scripts.doctor.context import Check, Context

EXAMPLES = """\
  python -m scripts.doctor -c configs/mnist.yaml
  python -m scripts.doctor -c configs/cifar10.yaml -mp auto train.batch_size=256
  accelerate-launch --config_file configs/accelerate/eight_gpus.yaml -m scripts.doctor -c configs/cifar10.yaml -mp auto"""


def parse_args():
    return flags.parse_training(cli.Parser(__doc__, EXAMPLES))


def main() -> None:
    args = parse_args()
    cfg = loading.load(args.config, args.overrides)
    accelerator = distributed.build_training_accelerator(cfg.train, Path(tempfile.gettempdir()), TRACKERS)
    context = Context(args, cfg, accelerator, args.exp_dir or Path("runs") / Path(args.config or "run").stem)
    for check in CHECKS:
        try:
            for level, text in check(context):
                report(context, level, check, text)
        except UserError as error:
            report(context, "fail", check, str(error))
    own = {name for level, name, _ in context.lines if level == "fail"}
    failed = set().union(*distributed.gather_to_main(accelerator, own) or [])  # some on another machine alone
    others = [level for level, name, _ in context.lines if name not in failed]
    counts = f"{len(failed)} failed, {others.count('warn')} warned, {others.count('pass')} passed"
    if distributed.any_process(accelerator, bool(own)):
        accelerator.print(messages.summary(counts, args.start, "fix what failed and start this command again"))
        sys.exit(2)
    train = ["train.py", *args.typed("config"), "-e", context.run_dir, *args.overrides]
    accelerator.print(messages.summary(counts, args.start, f"start the training with: {commands.relaunched(*train)}"))


def report(context: Context, level: str, check: Check, text: str) -> None:
    name = check.__name__.replace("_", " ")
    context.lines.append((level, name, text))
    context.accelerator.print(f"{level}  {name}: {text}", flush=True)
    if level == "fail" and not context.accelerator.is_main_process:  # which may have passed there, on another machine
        print(f"process {context.accelerator.process_index}: {level}  {name}: {text}", file=sys.stderr, flush=True)


CHECKS: list[Check] = [
    machine.packages, machine.devices, machine.folder,
    configuration.data, configuration.network, configuration.long_steps, configuration.batch, configuration.learning_rate,
    configuration.ema, configuration.checkpoints,
    machine.features, configuration.evaluation, machine.trial, machine.memory, machine.disk,
]  # fmt: skip


if __name__ == "__main__":
    cli_main(main)
