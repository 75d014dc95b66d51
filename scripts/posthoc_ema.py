"""Averages of any width after the training: `python -m scripts.posthoc_ema --weights runs/mnist --width 0.02 0.05 0.1 0.2`.

The width is the relative standard deviation of the average's profile in time. The run must have stored averages of other widths
(ema.power_widths), from which these are reconstructed, at the last step or at any other where they were stored. Each becomes a
snapshot, RUN/posthoc_ema/width_0.020_step_00004000.safetensors, that every script takes as --weights.
"""

from pathlib import Path

from configs import loading
from flow.runtime import cli, commands, distributed, flags, messages
from flow.runtime.errors import cli_main
from flow.sampling import exported, posthoc_ema, snapshot

EXAMPLES = """\
  python train.py -c configs/digits.yaml -e runs/widths 'ema.power_widths=[0.05, 0.1]' ema.power_every_steps=20
  python -m scripts.posthoc_ema --weights runs/widths --width 0.02 0.05 0.1 0.2
  python -m scripts.posthoc_ema --weights runs/widths --width 0.1 --step 550"""


def parse_args():
    parser = cli.Parser(__doc__, EXAMPLES)
    parser.add_argument("--weights", type=Path, required=True, metavar="RUN", help="run folder")
    flags.add_widths_flag(parser, "--width", "relative standard deviations, each a snapshot", required=True)
    flags.add_count_flag(parser, "--step", "training step whose averages were stored; without it the last")
    return parser.parse()


def main() -> None:
    args = parse_args()
    loading.overridden(args.overrides)  # refuses what is no key, before anything is written
    accelerator = distributed.build_single_process_accelerator("posthoc_ema")
    paths = posthoc_ema.reconstruct(accelerator, args.weights, args.width, args.step)
    names = " ".join(path.name for path in paths)
    words = exported.sample_flags(snapshot.load(paths[0], None, args.overrides), None)
    sample = commands.sample_command(paths[0], f"{args.weights.name}_{paths[0].stem}", *words, *args.overrides)
    print(messages.summary(f"{names} in {paths[0].parent}", args.start, f"sample from the first with: {sample}"))


if __name__ == "__main__":
    cli_main(main)
