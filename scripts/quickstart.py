"""Train on the embedded digits, sample with guidance, tabulate distance against NFE: minutes on a CPU.

Each step is a command that a user would type, and is printed. Run it again to resume.
"""

from pathlib import Path

from flow.runtime import cli, files
from flow.runtime.commands import command, train_arguments
from flow.runtime.errors import cli_main
from flow.runtime.subprocesses import run_command

RUN = Path("runs/digits")
SAMPLES = Path("samples/quickstart")


def main() -> None:
    args = cli.Parser(__doc__, "  make quickstart").parse(takes_keys=False)
    run_command(train_arguments("configs/digits.yaml", RUN, []))
    sample = f"sample.py --weights {RUN} --n_samples 100 --save_dir {SAMPLES} --guidance_scale 2"
    run_command(f"{sample} --sampling_method heun --sampling_steps 10".split())
    evaluate = f"evaluate.py --weights {RUN} --feature_extractor digits --n_samples 1797 --bspp 599 --metrics fid prc accuracy"
    run_command(f"{evaluate} --methods euler heun --sampling_steps 2 5 10".split())
    run_command(f"{evaluate} --methods heun --sampling_steps 10 --guidance_scale 2 --out {RUN}/evaluation_guided".split())
    result = f"\n{SAMPLES}/grid.png (guided samples, a column per class), {RUN}/evaluation/nfe.png (the table as a plot)"
    animate = command("-m", "scripts.animate", "--weights", RUN, "--out", files.free_folder(Path("figures/digits")))
    print(cli.summary(result, args.start, f"watch digits form with: {animate}"))


if __name__ == "__main__":
    cli_main(main)
