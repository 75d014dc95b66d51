"""Train on the embedded digits, sample with guidance, tabulate distance against NFE: two minutes on a CPU.

Each step is a command that a user would type, and is printed. Run it again to resume.
"""

from contextlib import suppress
from pathlib import Path

from configs import loading
from flow.runtime import cli, commands, files, messages, step_names
from flow.runtime.commands import train_arguments
from flow.runtime.errors import CONTINUES, cli_main
from flow.runtime.subprocesses import run_command
from flow.sampling import locate

RUN = Path("runs/digits")
SAMPLES = Path("samples/quickstart")


def main() -> None:
    args = cli.Parser(__doc__, "  make quickstart").parse(takes_keys=False)
    train()
    samples = files.free_folder(SAMPLES, holds_samples_of_run)
    sample = f"sample.py --weights {RUN} --n_samples 100 --save_dir {samples} --guidance_scale 2"
    run_command(f"{sample} --sampling_method heun --sampling_steps 10".split())
    evaluate = f"evaluate.py --weights {RUN} --feature_extractor digits --n_samples 1797 --bspp 599 --metrics fid prc accuracy"
    run_command(f"{evaluate} --methods euler heun --sampling_steps 2 5 10".split())
    result = f"\n{samples}/grid.png (guided samples, a column per class), {RUN}/evaluation/nfe.png (the table as a plot)"
    animate = commands.command("-m", "scripts.animate", "--weights", RUN, "--out", files.free_folder(Path("figures/digits")))
    print(messages.summary(result, args.start, f"watch digits form with: {animate}"))


def train() -> None:
    """Train, unless the run is already past the last step of its configuration: no run can be resumed to an earlier step."""
    config = str(commands.shipped("digits.yaml"))
    steps = loading.load(config).train.steps
    reached = max(step_names.by_step(RUN / "checkpoints"), default=0)
    if reached > steps:
        print(f"note: {RUN} is at step {reached} already, past the {steps} of {config}")
    else:
        run_command(train_arguments(config, RUN, []))


def holds_samples_of_run(folder: Path) -> bool:
    """Whether the images in a folder are of the weights that the run has now."""
    with suppress(OSError, ValueError):
        return files.read_json(folder / "sampling.json").get("weights_sha256") == files.sha256(locate.find(RUN))
    return False


if __name__ == "__main__":
    cli_main(main, CONTINUES)
