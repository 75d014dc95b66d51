"""Speed of training, sampling and evaluation on this machine: `python -m scripts.benchmark -c configs/cifar10.yaml`.

It measures the code of train.py, sample.py and evaluate.py, each in a process of its own, with a timer in its
callbacks and around its networks. With `--against eager` the same network also runs in the loop of
scripts/benchmark/baseline.py. The jobs take turns, `--rounds` times, and the median of all their steps counts. FLOPs are those
of torch.utils.flop_counter, and the ceiling is the fastest matrix product or convolution of the machine in the same precision.
`--out` gets benchmark.json and benchmark.md.

`python -m scripts.benchmark quality --help`: recipes that train for the same minutes, and what their samples are worth.
"""

import json
import shlex
import sys
import tempfile
from contextlib import nullcontext
from pathlib import Path

from configs import loading, schema
from configs.errors import UserError
from flow.runtime import cli, commands, files, flags, lock, messages
from flow.runtime.errors import cli_main, error_context
from scripts.benchmark import quality, report
from scripts.benchmark.plan import plan_of
from scripts.benchmark.trial import start_job

EXAMPLES = """\
  python -m scripts.benchmark -c configs/mnist_mini_cond.yaml --against eager
  python -m scripts.benchmark -c configs/cifar10.yaml --parts train --precisions no bf16 --against eager \\
      --steps 2 --rounds 3 --out docs/benchmark train.batch_size=32
  python -m scripts.benchmark -c configs/mnist_mini_cond.yaml --parts scaling --processes 1 2 --precisions bf16
  python -m scripts.benchmark -c configs/cifar10.yaml --parts train --vary train.batch_size 8 16 32"""


PARTS = ("train", "sample", "evaluate", "scaling")
PARTS_OF = {  # flags that only some of them read
    "sampling_batch": ("sample", "evaluate"), "sampling_steps": ("sample", "evaluate"), "sampling_batches": ("sample",),
    "n_samples": ("evaluate",), "feature_extractor": ("evaluate",), "processes": ("scaling",),
}  # fmt: skip


def parse_args():
    parser = cli.Parser(__doc__, EXAMPLES)
    flags.add_config_flag(parser, "of the training that is measured")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=["train", "sample"], help="(default: train sample)")
    parser.add_argument("--precisions", nargs="+", choices=schema.MIXED_PRECISIONS, default=["no", "bf16"])
    parser.add_argument("--against", choices=("eager",), help="also the loop that a user would write, in fp32")
    flags.add_count_flag(parser, "--steps", "training steps per round", 10)
    flags.add_count_flag(parser, "--warmup", "steps or batches that do not count", 2)
    flags.add_count_flag(parser, "--rounds", "turns of each job", 3)
    flags.add_count_flag(parser, "--sampling_batch", "images per batch of sample", 32)
    flags.add_count_flag(parser, "--sampling_batches", "batches per round", 3)
    flags.add_count_flag(parser, "--sampling_steps", "Euler steps", 5)
    flags.add_count_flag(parser, "--n_samples", "images of evaluate", 500, least=4)
    flags.add_extractor_flag(parser)
    parser.add_argument("--processes", nargs="+", type=flags.at_least(1), default=[1, 2], help="of scaling (default: 1 2)")
    parser.add_argument("--vary", nargs="+", metavar=("KEY", "VALUE"), default=[], help="all of it for each value of a key")
    flags.add_compile_flag(parser)
    flags.add_output_flag(parser, use="output folder (default: only printed)", required=False)
    args = parser.parse()
    if not args.config and not args.overrides:
        raise UserError("-c: a configuration is needed, e.g. -c configs/mnist.yaml")
    for flag, parts in PARTS_OF.items():
        if not set(parts) & set(args.parts):
            args.refuse_typed([flag], f"is for --parts {' or '.join(parts)}")
    if len(args.vary) == 1:
        raise UserError(f"--vary {args.vary[0]}: give a key and its values")
    keys = {*loading.overridden(args.overrides), *args.vary[:1]}
    for key, flag in {"train.steps": "--steps", "train.mixed_precision": "--precisions", "train.compile": "--compile"}.items():
        if key in keys:
            raise UserError(f"{key}: {flag} says what is measured")
    return args


def main() -> None:
    if sys.argv[1:2] == ["quality"]:
        return quality.main(sys.argv[2:])
    args = parse_args()
    plan = plan_of(args)
    with lock.folder(args.out) if args.out else nullcontext():
        if args.out:
            check_folder(args, plan)
        measure(args, plan)


def check_folder(args, plan: dict[str, dict]) -> None:
    """Raises UserError where --out holds a benchmark of another configuration or of other jobs."""
    path = args.out / "benchmark.json"
    if path.exists():
        with error_context(f"--out {args.out}: its benchmark.json is damaged; name another folder"):
            record = files.read_json(path)
            overrides = record.get("overrides") if isinstance(record, dict) else None
            if not isinstance(overrides, list) or not all(isinstance(word, str) for word in overrides):
                raise ValueError("it holds something else")
        before, now = (shlex.join([r.get("config") or "defaults", *r["overrides"]]) for r in (record, vars(args)))
        if before != now:
            raise UserError(f"--out {args.out}: holds a benchmark of {before}, now {now}; name another folder")
        if record.get("plan", plan) != plan:
            raise UserError(f"--out {args.out}: holds a benchmark with other flags; name another folder")


def measure(args, plan: dict[str, dict]) -> None:
    """Run the jobs, print the tables and write them to --out."""
    with tempfile.TemporaryDirectory() as scratch:
        results: dict[str, list[dict]] = {name: [] for name in plan}
        costs: dict[str, dict] = {}  # by overrides
        for overrides in {str(job["overrides"]): job["overrides"] for job in plan.values()}.values():
            costs[str(overrides)] = run_job({"kind": "cost", "overrides": overrides}, args, Path(scratch))
        precisions = sorted({job["precision"] for job in plan.values()})
        ceilings = run_job({"kind": "ceilings", "precisions": precisions}, args, Path(scratch))
        for turn in range(args.rounds):
            for name, job in plan.items():
                print(f"round {turn + 1} of {args.rounds}: {name}", file=sys.stderr, flush=True)
                results[name].append(run_job(job, args, Path(scratch)))
    rows = [report.medians(name, job, results[name], costs[str(job["overrides"])], ceilings) for name, job in plan.items()]
    for row in rows:
        alike = [r for r in rows if (r["kind"], r["overrides"]) == (row["kind"], row["overrides"])]
        slow = next((r for r in alike if r["variant"] == "eager"), None)
        row["ratio"] = row["images_per_second"] / slow["images_per_second"] if slow else None
    result = {"machine": report.machine(), "config": args.config, "overrides": args.overrides, "plan": plan, "costs": costs,
              "ceilings": ceilings, "rows": rows, "rounds": results}  # fmt: skip
    text = report.markdown(result)
    print(text)
    train = ["train.py", *args.typed("config"), *args.overrides]
    command = commands.command(*train, "-e", files.free_folder(Path("runs") / Path(args.config or "run").stem))
    where = f" in {args.out}" if args.out else ""
    if args.out:
        files.write_text(args.out / "benchmark.json", json.dumps(result, indent=1))
        files.write_text(args.out / "benchmark.md", text + "\n")
    print(messages.summary(f"{len(rows)} row(s){where}", args.start, f"train this configuration with: {command}"))


def run_job(job: dict, args, scratch: Path) -> dict:
    """The result of a job with the configuration of the command line."""
    return start_job({"overrides": args.overrides, "config": args.config, **job}, scratch)


if __name__ == "__main__":
    cli_main(main)
