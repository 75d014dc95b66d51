"""Kill a script at random moments and restart it: `python -m scripts.dev.fault_injection --kills 100`.

A reference run comes first. Then the script is started again and again as a user would, and ended by SIGKILL, until it has
been killed so often and has come to its end. What it leaves must equal what the reference run left, to the bit. A third of the
kills come at any moment, a third when something unfinished is on the disk, a third when a random number of the files of one
checkpoint are written. All moments are drawn from --seed. The processes are forks of one that has imported everything, so
that a restart costs a tenth of a second and not five; they run the main of the script. `--out` keeps the folders and gets
faults.json.
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
from pathlib import Path

from tqdm import tqdm

from configs.schema import UserError
from flow.runtime import cli, files
from flow.runtime.errors import cli_main
from flow.runtime.files import TEMPORARY

EXAMPLES = """\
  python -m scripts.dev.fault_injection --kills 100
  python -m scripts.dev.fault_injection --kills 100 --script sample
  python -m scripts.dev.fault_injection --kills 1000 --seed 1 --out runs/faults"""


TINY = "model.args={width: 16, channel_mult: [1], blocks_per_level: 1, attention_resolutions: [], num_classes: 10}"


TRAIN = [
    "-c", "configs/digits.yaml", TINY, "train.batch_size=16", "train.steps=60", "train.checkpoint_every_steps=5",
    "train.log_every_steps=3", "train.sample_every_steps=20", "preview.n_samples=4", "preview.sampling_steps=1",
    "preview.guidance_scale=1", "train.log_with=[]", "ema.half_life_images=[100, 1000]",
]  # fmt: skip


TRAIN_VAE = [
    "data.name=digits", "autoencoder.channels=[8, 8]", "autoencoder.latent_channels=2", "autoencoder.blocks=1",
    "train.steps=40", "train.batch_size=16", "train.log_every_steps=3", "train.checkpoint_every_steps=5",
    "train.sample_every_steps=20", "train.log_with=[]", "ema.half_life_images=[100, 1000]", "preview_images=4",
]  # fmt: skip
COMMON = ["--bspp", "10", "--sampling_steps", "2", "--guidance_scale", "2"]


MAX_RESTARTS = 40  # after so many kills a run is left to its end


@dataclass(frozen=True)
class Job:
    """A script to kill."""

    arguments: Callable[[Path, Path], list[str]]  # (weights, output folder) -> how it is started, and started again
    module: str  # whose main it is
    needs: str | None = None  # the job whose result it takes as weights


def _train(weights: Path, out: Path) -> list[str]:
    begun = (out / "config.yaml").is_file()
    return [*TRAIN, "-e", str(out), *(["-r", "latest"] if begun else [])]


def _sample(weights: Path, out: Path) -> list[str]:
    return ["--weights", str(weights), "--save_dir", str(out), "--n_samples", "100", "--npz", *COMMON]


def _make_pairs(weights: Path, out: Path) -> list[str]:
    more = ["--n_pairs", "120", "--shard_pairs", "10", "--real_fraction", "0.25"]
    return ["--weights", str(weights), "--save_dir", str(out), *more, *COMMON]


def _train_vae(weights: Path, out: Path) -> list[str]:
    begun = (out / "config.yaml").is_file()
    return [*TRAIN_VAE, "-e", str(out), *(["-r", "latest"] if begun else [])]


def _cache_latents(weights: Path, out: Path) -> list[str]:
    images = ["data.name=digits", "--shard_images", "100", "--bspp", "50"]
    return ["--vae", str(weights / "autoencoder"), "--save_dir", str(out), *images]


JOBS = {
    "train": Job(_train, "train"),
    "sample": Job(_sample, "sample", needs="train"),
    "make_pairs": Job(_make_pairs, "scripts.make_pairs", needs="train"),
    "train_vae": Job(_train_vae, "scripts.train_vae"),
    "cache_latents": Job(_cache_latents, "scripts.cache_latents", needs="train_vae"),
}


def parse_args():
    parser = cli.Parser(__doc__, EXAMPLES)
    parser.add_argument("--kills", type=cli.at_least(1), default=100, metavar="N", help="(default: 100)")
    parser.add_argument("--script", choices=JOBS, default="train", help="(default: train)")
    parser.add_argument("--seed", type=cli.at_least(0), default=0, help="of the moments (default: 0)")
    parser.add_argument("--out", type=Path, metavar="DIR", help="keeps everything (default: a temporary folder)")
    return parser.parse()


def main() -> None:
    args = parse_args()
    if args.out and args.out.exists() and not files.is_empty_dir(args.out):
        raise UserError(f"--out {args.out}: exists already; name another folder")
    with tempfile.TemporaryDirectory() as scratch:
        folder = args.out or Path(scratch)
        folder.mkdir(parents=True, exist_ok=True)
        found = inject_faults(args.script, args.kills, args.seed, folder)
        if args.out:
            files.write_text(folder / "faults.json", json.dumps(found, indent=1))
    print(json.dumps(found, indent=1))
    if found["differences"]:
        raise UserError(f"{args.script} left something else than its reference run: {found['differences'][0]}")
    print(f"{args.script}: {found['kills']} kills in {found['runs']} run(s), all equal to the reference run")


def inject_faults(script: str, kills: int, seed: int, folder: Path) -> dict:
    """Kill the script so many times; the figures, with what differs from the reference run (nothing, if all is well)."""
    os.environ["FLOW_NUM_THREADS"] = "1"
    os.environ["PYTHONWARNINGS"] = "ignore:resource_tracker"  # killed processes leave semaphores, which is reported
    makers = multiprocessing.get_context("forkserver")
    makers.set_forkserver_preload(["sklearn.datasets", *(job.module for job in JOBS.values())])
    rng = random.Random(seed)
    weights, reference = folder / "weights", folder / "reference"
    if needs := JOBS[script].needs:
        _run_to_end(makers, needs, weights, weights, folder / "log.txt")
    first = makers.Process(target=sys.exit)  # waits for the imports
    first.start()
    first.join()
    started = time.perf_counter()
    _run_to_end(makers, script, weights, reference, folder / "log.txt")
    seconds = time.perf_counter() - started
    moments: Counter[str] = Counter()
    differences: list[str] = []
    runs = 0
    bar = tqdm(total=kills, desc="kills", mininterval=10)
    while sum(moments.values()) < kills:
        out = folder / f"killed_{runs}"
        for _ in range(min(MAX_RESTARTS, kills - sum(moments.values()))):
            moment = _run_and_kill(makers, script, weights, out, folder / "log.txt", rng, seconds)
            if moment is None:
                break
            moments[moment] += 1
            bar.update()
        _run_to_end(makers, script, weights, out, folder / "log.txt")
        differences += [f"{out.name}: {line}" for line in compare(reference, out)]
        runs += 1
    bar.close()
    return {
        "script": script, "seed": seed, "kills": sum(moments.values()), "runs": runs, "moments": dict(sorted(moments.items())),
        "differences": differences, "reference_seconds": round(seconds, 2),
        "seconds": round(time.perf_counter() - started, 1),
    }  # fmt: skip


def _start(makers, script: str, weights: Path, out: Path, log: Path):
    process = makers.Process(target=_run_main, args=(JOBS[script].module, JOBS[script].arguments(weights, out), str(log)))
    process.start()
    return process


def _run_main(module: str, arguments: list[str], log: str) -> None:
    """The main of the script with these arguments, its output appended to the log."""
    with open(log, "a", encoding="utf-8") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.argv = [f"{module}.py", *arguments]
    cli_main(sys.modules[module].main)


def _run_to_end(makers, script: str, weights: Path, out: Path, log: Path) -> None:
    """Run the script to its end."""
    process = _start(makers, script, weights, out, log)
    process.join()
    if process.exitcode:
        lines = log.read_text(encoding="utf-8").splitlines() or [""]
        raise UserError(f"{script} in {out} ended with exit code {process.exitcode}: {lines[-1]}")


def _run_and_kill(makers, script: str, weights: Path, out: Path, log: Path, rng: random.Random, seconds: float) -> str | None:
    """Start the script and kill it; what it was at then, or None where it had come to its end by itself."""
    delay, kind, parts = rng.uniform(0, seconds), rng.choice(["any", "unfinished", "between"]), rng.randint(1, 8)
    process = _start(makers, script, weights, out, log)
    started = time.perf_counter()
    while process.exitcode is None:
        waited = time.perf_counter() - started > delay
        unfinished = _unfinished(out) if kind != "any" else []
        # Where a script has no folder of several files under way, `between` is a moment like any other.
        if kind == "between" and script in ("train", "train_vae"):
            now = max(map(_parts, unfinished), default=0) >= parts
        else:
            now = waited and (kind != "unfinished" or bool(unfinished))
        if now:
            break
    process.kill()
    process.join()
    if process.exitcode == 0:
        return None
    if process.exitcode > 0:
        raise UserError(f"{script} in {out} failed by itself; see {log}")
    return _moment(out)


def _unfinished(out: Path) -> list[Path]:
    """What lies there under a temporary name, one folder deep."""
    folders = [out, *(out / name for name in ("checkpoints", "snapshots", "samples", "images"))]
    found = []
    for folder in folders:
        try:
            found += [Path(entry.path) for entry in os.scandir(folder) if entry.name.startswith(TEMPORARY)]
        except FileNotFoundError:
            continue
    return found


def _parts(unfinished: Path) -> int:
    try:
        return len(os.listdir(unfinished))
    except (FileNotFoundError, NotADirectoryError):
        return 0


def _moment(out: Path) -> str:
    """What the killed process was at, from what it left behind."""
    for path in _unfinished(out):
        if path.is_dir():
            return f"writing a checkpoint, {len(list(path.iterdir()))} files begun"
        return "writing a snapshot" if path.parent.name == "snapshots" else "writing a file"
    if not out.exists():
        return "before the folder was there"
    saved = {p.name for p in (out / "checkpoints").glob("step_*")}
    published = {p.name.partition(".")[0] for p in (out / "snapshots").glob("step_*")}
    return "between a checkpoint and its snapshot" if saved - published else "at work"


def compare(one: Path, other: Path) -> list[str]:
    """How two folders of the same run differ: in the names of their files, or in their content. What clocks and paths say
    does not count: environment.json, log.txt, `images_per_second` in metrics.jsonl. An optimizer's state is compared as
    tensors, as its pickle may differ where its numbers do not, and with it the checksums of the manifest."""
    mine, theirs = ({p.relative_to(f) for f in [folder] for p in f.rglob("*") if p.is_file()} for folder in (one, other))
    found = [f"{path} is there only once" for path in sorted(mine ^ theirs)]
    for path in sorted(mine & theirs):
        sums = path.name == "manifest.json" and (one / path).with_name("state.json").exists()
        by_clock = sums or path.name in ("environment.json", "log.txt")
        if not by_clock and not _same(one / path, other / path):
            found.append(f"{path} differs")
    return found


def _same(one: Path, other: Path) -> bool:
    if one.name == "metrics.jsonl":
        return losses(one) == losses(other)
    if one.name == "optimizer.bin":
        return _tensors_equal(one, other)
    return one.read_bytes() == other.read_bytes()


def losses(path: Path) -> list[dict]:
    """The rows of metrics.jsonl without what a clock measured."""
    from flow.training.logging import read_metrics

    return [{k: v for k, v in row.items() if k != "images_per_second"} for row in read_metrics(path)]


def _tensors_equal(one: Path, other: Path) -> bool:
    import torch

    def leaves(value, path: str = "") -> dict:
        if not isinstance(value, dict | list | tuple):
            return {path: value}
        items = value.items() if isinstance(value, dict) else enumerate(value)
        return {k: v for name, inner in items for k, v in leaves(inner, f"{path}/{name}").items()}

    a, b = (leaves(torch.load(path, weights_only=True)) for path in (one, other))
    same = (torch.equal(a[k], b[k]) if isinstance(a[k], torch.Tensor) else a[k] == b[k] for k in a if k in b)
    return a.keys() == b.keys() and all(same)


if __name__ == "__main__":
    cli_main(main)
