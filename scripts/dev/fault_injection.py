"""Kill a script at random moments and restart it: `python -m scripts.dev.fault_injection --kills 100`.

A reference run of the script is never interrupted. Further runs are ended by SIGKILL and restarted as a user would restart
them, again and again, until the number of kills is reached; each run then finishes. Its output must equal that of the
reference run to the bit. A third of the kills come at any moment, a third while a temporary file or folder exists, a third
after a random number of the files of one checkpoint are written. All moments are functions of --seed. Killed processes are
forks of one that has imported everything, so that a restart costs a tenth of a second and not five; they run the main of
the script. `--out` keeps all folders and gets fault_injection.json.
"""

import json
import multiprocessing
import os
import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.context import ForkServerContext, ForkServerProcess
from pathlib import Path

import torch
from tqdm import tqdm

from configs.errors import UserError
from flow.runtime import cli, commands, files, flags, messages
from flow.runtime.errors import cli_main
from flow.runtime.files import TEMPORARY
from flow.training.logging import read_metrics

EXAMPLES = """\
  python -m scripts.dev.fault_injection --kills 100
  python -m scripts.dev.fault_injection --kills 100 --script sample
  python -m scripts.dev.fault_injection --kills 1000 --seed 1 --out runs/fault_injection"""

TINY_NETWORK = [
    "model.name=unet",
    "model.args={width: 16, channel_mult: [1], blocks_per_level: 1, attention_resolutions: [], num_classes: 10}",
]
TRAIN = [
    "train.batch_size=16", "train.steps=60", "train.checkpoint_every_steps=5", "train.log_every_steps=3",
    "train.sample_every_steps=20", "train.log_with=[]", "ema.half_life_images=[100, 1000]",
]  # fmt: skip
TRAIN_FLOW = [
    "-c", "configs/digits.yaml", *TINY_NETWORK, *TRAIN, "preview.n_samples=4", "preview.sampling_steps=1",
    "preview.guidance_scale=1", "ema.power_widths=[0.05, 0.1]", "ema.power_every_steps=4", "data.args.split=train",
    "evaluate.every_steps=12", "evaluate.n_samples=20", "evaluate.sampling_steps=1", "evaluate.feature_extractor=digits",
    "evaluate.keep_best=fid", "evaluate.loss_every_steps=6", "evaluate.loss_samples=20",
]  # fmt: skip
TRAIN_VAE = [
    "data.name=digits", "autoencoder.channels=[8, 8]", "autoencoder.latent_channels=2", "autoencoder.blocks=1", *TRAIN,
    "preview_images=4",
]  # fmt: skip
SAMPLING = ["--bspp", "10", "--sampling_steps", "2", "--guidance_scale", "2"]
MAX_RESTARTS = 40  # of one run; then it is left to finish
MAX_CHECKPOINT_FILES = 10  # of a checkpoint of a tiny run


@dataclass(frozen=True)
class Job:
    """A script that is killed."""

    module: str  # whose main is run
    arguments: Callable[[Path, Path], list[str]]  # (weights, output folder) -> arguments of a start and of a restart
    weights: str | None = None  # the job whose reference run makes the weights
    has_checkpoints: bool = False


def _training(settings: list[str]) -> Callable[[Path, Path], list[str]]:
    def arguments(weights: Path, out: Path) -> list[str]:
        started = (out / "config.yaml").is_file()
        return [*settings, "-e", str(out), *(["-r", "latest"] if started else [])]

    return arguments


def _sample(weights: Path, out: Path) -> list[str]:
    return ["--weights", str(weights), "--save_dir", str(out), "--n_samples", "100", "--npz", *SAMPLING]


def _make_pairs(weights: Path, out: Path) -> list[str]:
    pairs = ["--n_pairs", "120", "--shard_pairs", "10", "--real_fraction", "0.25"]
    return ["--weights", str(weights), "--save_dir", str(out), *pairs, *SAMPLING]


def _cache_latents(weights: Path, out: Path) -> list[str]:
    check = ["--check", "100", "--feature_extractor", "digits"]
    shards = ["--shard_images", "100", "--bspp", "50"]
    return ["--vae", str(weights / "autoencoder"), "--save_dir", str(out), "data.name=digits", *shards, *check]


def _pack_images(weights: Path, out: Path) -> list[str]:
    return ["--source", "digits", "--shard_images", "50", "--save_dir", str(out)]


JOBS = {
    "train": Job("train", _training(TRAIN_FLOW), has_checkpoints=True),
    "sample": Job("sample", _sample, "train"),
    "make_pairs": Job("scripts.make_pairs", _make_pairs, "train"),
    "train_vae": Job("scripts.train_vae", _training(TRAIN_VAE), has_checkpoints=True),
    "cache_latents": Job("scripts.cache_latents", _cache_latents, "train_vae"),
    "pack_images": Job("scripts.pack_images", _pack_images),
}


def parse_args():
    parser = cli.Parser(__doc__, EXAMPLES)
    flags.add_count_flag(parser, "--kills", "number of kills", 100)
    parser.add_argument("--script", choices=JOBS, default="train", help="script to kill (default: train)")
    flags.add_seed_flag(parser, 0, "moments")
    flags.add_output_flag(parser, use="folder that keeps everything (default: a temporary one)", required=False)
    return parser.parse(takes_keys=False)


def main() -> None:
    args = parse_args()
    if args.out and args.out.exists() and not files.is_empty_dir(args.out):
        raise UserError(f"--out {args.out}: exists already; name another folder")
    with tempfile.TemporaryDirectory() as scratch:
        folder = args.out or Path(scratch)
        folder.mkdir(parents=True, exist_ok=True)
        result = Experiment(args.script, args.seed, folder).run(args.kills)
        if args.out:
            files.write_text(folder / "fault_injection.json", json.dumps(result, indent=1))
    print(json.dumps(result, indent=1))
    if result["differences"]:
        raise UserError(f"{args.script}: killed runs differ from the reference run: {result['differences'][0]}")
    others = [name for name in JOBS if name != args.script]
    again = ["--kills", str(args.kills), "--script", others[0]]
    where = f", all files in {args.out}" if args.out else ""
    print(
        messages.summary(
            f"{args.script}: {result['kills']} kills in {result['runs']} run(s), all equal to the reference run{where}",
            args.start, f"try another script with: {commands.command('-m', 'scripts.dev.fault_injection', *again)}",
        )
    )  # fmt: skip


class Experiment:
    """Kills and restarts of one script, all in one folder."""

    def __init__(self, script: str, seed: int, folder: Path):
        self.script = script
        self.seed = seed
        self.folder = folder
        self.log = folder / "log.txt"
        self.weights = folder / "weights"
        self.rng = random.Random(seed)
        os.environ["FLOW_NUM_THREADS"] = "1"
        os.environ["PYTHONWARNINGS"] = "ignore:resource_tracker"  # warns of semaphores of killed processes
        self.context: ForkServerContext = multiprocessing.get_context("forkserver")
        self.context.set_forkserver_preload(
            ["sklearn.datasets", "flow.training.evaluation", *(job.module for job in JOBS.values())]
        )

    def run(self, kills: int) -> dict:
        """The figures, and how the killed runs differ from the reference run: an empty list where they do not."""
        if source := JOBS[self.script].weights:
            self.finish(source, self.weights)
        first = self.context.Process(target=sys.exit)  # waits for the imports
        first.start()
        first.join()
        start = time.perf_counter()
        reference = self.folder / "reference"
        self.finish(self.script, reference)
        reference_seconds = time.perf_counter() - start
        moments: Counter[str] = Counter()
        differences: list[str] = []
        runs = 0
        with tqdm(total=kills, desc="kills", mininterval=10) as bar:
            while moments.total() < kills:
                out = self.folder / f"killed_{runs}"
                for _ in range(min(MAX_RESTARTS, kills - moments.total())):
                    moment = self.kill(out, reference_seconds)
                    if moment is None:
                        break
                    moments[moment] += 1
                    bar.update()
                self.finish(self.script, out)
                differences += [f"{out.name}: {line}" for line in compare(reference, out)]
                runs += 1
        return {
            "script": self.script, "seed": self.seed, "kills": moments.total(), "runs": runs,
            "moments": dict(sorted(moments.items())), "differences": differences,
            "reference_seconds": round(reference_seconds, 2), "seconds": round(time.perf_counter() - start, 1),
        }  # fmt: skip

    def start(self, script: str, out: Path) -> ForkServerProcess:
        """A process that runs the script."""
        job = JOBS[script]
        process = self.context.Process(target=_run_main, args=(job.module, job.arguments(self.weights, out), str(self.log)))
        process.start()
        return process

    def finish(self, script: str, out: Path) -> None:
        """Run the script to its end. Raises UserError where it fails."""
        process = self.start(script, out)
        process.join()
        if process.exitcode:
            lines = self.log.read_text(encoding="utf-8").splitlines() or [""]
            raise UserError(f"{script} in {out} ended with exit code {process.exitcode}: {lines[-1]}")

    def kill(self, out: Path, reference_seconds: float) -> str | None:
        """Start the script and kill it: the moment of the kill, or None where the script finished first."""
        delay = self.rng.uniform(0, reference_seconds)
        kind = self.rng.choice(["any", "unfinished", "between"])
        num_files = self.rng.randint(1, MAX_CHECKPOINT_FILES)
        process = self.start(self.script, out)
        start = time.perf_counter()
        while process.exitcode is None:
            late = time.perf_counter() - start > delay
            temporaries = _temporaries(out) if kind != "any" else []
            if kind == "between" and JOBS[self.script].has_checkpoints:
                due = max(map(_num_files, temporaries), default=0) >= num_files
            else:
                due = late and (kind != "unfinished" or bool(temporaries))
            if due:
                break
        process.kill()
        process.join()
        if process.exitcode == 0:
            return None
        if process.exitcode > 0:
            raise UserError(f"{self.script} in {out} failed without a kill; see {self.log}")
        return _moment(out)


def _run_main(module: str, arguments: list[str], log: str) -> None:
    """The main of a script with these arguments; its output is appended to the log."""
    with open(log, "a", encoding="utf-8") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.argv = [f"{module}.py", *arguments]
    cli_main(sys.modules[module].main)


def _temporaries(out: Path) -> list[Path]:
    """Files and folders under a temporary name, one folder deep."""
    paths = []
    for folder in [out, *(out / name for name in ("checkpoints", "snapshots", "samples", "images"))]:
        try:
            paths += [Path(entry.path) for entry in os.scandir(folder) if entry.name.startswith(TEMPORARY)]
        except FileNotFoundError:
            continue
    return paths


def _num_files(folder: Path) -> int:
    try:
        return len(os.listdir(folder))
    except (FileNotFoundError, NotADirectoryError):
        return 0


def _moment(out: Path) -> str:
    """What a killed process was doing, by the files that exist."""
    for path in _temporaries(out):
        if path.is_dir():
            kind = "a checkpoint" if path.parent.name == "checkpoints" else "a folder"
            return f"writing {kind}, {len(list(path.iterdir()))} files started"
        return "writing a snapshot" if path.parent.name == "snapshots" else "writing a file"
    if not out.exists():
        return "before the folder exists"
    checkpoints = {p.name for p in (out / "checkpoints").glob("step_*")}
    snapshots = {p.name.partition(".")[0] for p in (out / "snapshots").glob("step_*")}
    return "between a checkpoint and its snapshot" if checkpoints - snapshots else "computing"


def compare(reference: Path, other: Path) -> list[str]:
    """How two folders of the same run differ, in names or contents of files.

    Clocks and paths do not count: environment.json, log.txt, `images_per_second` in metrics.jsonl, and in the table of an
    evaluation the seconds and the name of the run. The state of an optimizer
    is compared as tensors, since equal tensors may be pickled differently; so the checksums of a checkpoint's manifest do not
    count either.
    """
    expected, actual = ({p.relative_to(f) for p in f.rglob("*") if p.is_file()} for f in (reference, other))
    lines = [f"{path} is in one of the two folders only" for path in sorted(expected ^ actual)]
    for path in sorted(expected & actual):
        checksums = path.name == "manifest.json" and (reference / path).with_name("state.json").exists()
        skipped = checksums or path.name in ("environment.json", "log.txt", "results.csv", "results.md")
        if not skipped and not _equal(reference / path, other / path):
            lines.append(f"{path} differs")
    return lines


def _equal(one: Path, other: Path) -> bool:
    if one.name == "metrics.jsonl":
        return losses(one) == losses(other)
    if one.name == "results.jsonl":
        return _measurements(one) == _measurements(other)
    if one.name == "optimizer.bin":
        return _tensors_equal(one, other)
    return one.read_bytes() == other.read_bytes()


def losses(path: Path) -> list[dict]:
    """The rows of metrics.jsonl without what a clock measured."""
    return [{k: v for k, v in row.items() if k != "images_per_second"} for row in read_metrics(path)]


def _measurements(path: Path) -> list[dict]:
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return [{k: v for k, v in row.items() if k not in ("seconds", "weights")} for row in rows]


def _tensors_equal(one: Path, other: Path) -> bool:
    def leaves(value, path: str = "") -> dict:
        if not isinstance(value, dict | list | tuple):
            return {path: value}
        items = value.items() if isinstance(value, dict) else enumerate(value)
        return {k: v for name, inner in items for k, v in leaves(inner, f"{path}/{name}").items()}

    a, b = (leaves(torch.load(path, weights_only=True)) for path in (one, other))
    equal = (torch.equal(a[k], b[k]) if isinstance(a[k], torch.Tensor) else a[k] == b[k] for k in a if k in b)
    return a.keys() == b.keys() and all(equal)


if __name__ == "__main__":
    cli_main(main)
