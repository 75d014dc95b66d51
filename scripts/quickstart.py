"""The whole way on the embedded digits, in minutes on a CPU: train, sample with guidance, tabulate distance against NFE.

Each step is a command that a user would type, and is printed. Running it again goes on where it stopped.
"""

import shlex
import subprocess
import sys
from pathlib import Path

from flow.engine import cli, runtime

RUN = Path("runs/digits")
SAMPLES = Path("samples/digits")


def main() -> None:
    cli.Parser(__doc__, "  make quickstart").parse()
    step(f"train.py -c configs/digits.yaml{' -r latest' if any(RUN.glob('checkpoints/step_*')) else ''}")
    step(
        f"sample.py --weights {RUN} --n_samples 100 --save_dir {SAMPLES} --sampling_method heun --sampling_steps 10 "
        "--guidance_scale 2"
    )
    evaluate = f"evaluate.py --weights {RUN} --feature_extractor digits --n_samples 1797 --bspp 599 --metrics fid prc accuracy"
    step(f"{evaluate} --methods euler heun --sampling_steps 2 5 10 20")
    step(f"{evaluate} --methods heun --sampling_steps 10 --guidance_scale 2 --out {RUN}/evaluation_guided")
    print(f"\nlook at: {SAMPLES}/grid.png (guided samples, a column a class), {RUN}/evaluation/nfe.png (the table as a plot)")


def step(command: str) -> None:
    print(f"\n$ python {command}", flush=True)
    status = subprocess.run([sys.executable, *shlex.split(command)]).returncode
    if status:
        sys.exit(status)


if __name__ == "__main__":
    runtime.run(main)
