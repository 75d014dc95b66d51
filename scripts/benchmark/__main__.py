"""Speed of training, sampling and evaluation on this machine: `python -m scripts.benchmark -c configs/cifar10.yaml`.

It measures the code of train.py, sample.py and evaluate.py, each in a process of its own, with a timer in its
callbacks and around its networks. With `--against eager` the same network also runs in the loop of
scripts/benchmark/baseline.py. The jobs take turns, `--rounds` times, and the median of all their steps counts. FLOPs are those
of torch.utils.flop_counter, and the ceiling is the fastest matrix product or convolution of the machine in the same precision.
`--out` gets benchmark.json and benchmark.md.

`python -m scripts.benchmark quality --help`: recipes that train for the same minutes, and what their samples are worth.
"""

import ast
import json
import os
import platform
import shlex
import statistics
import sys
import tempfile
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch

from configs import loading, schema
from configs.errors import UserError
from flow.evaluation import table
from flow.losses.base import PASSES
from flow.runtime import cli, commands, files, flags, lock, messages
from flow.runtime.errors import cli_main, error_context
from scripts.benchmark import quality
from scripts.benchmark.trial import name_of, start_job

EXAMPLES = """\
  python -m scripts.benchmark -c configs/mnist_mini_cond.yaml --against eager
  python -m scripts.benchmark -c configs/cifar10.yaml --parts train --precisions no bf16 --against eager \\
      --steps 2 --rounds 3 --out docs/benchmark train.batch_size=32
  python -m scripts.benchmark -c configs/mnist_mini_cond.yaml --parts scaling --processes 1 2 --precisions bf16
  python -m scripts.benchmark -c configs/cifar10.yaml --parts train --vary train.batch_size 8 16 32"""


SETTINGS = (  # of a job, besides its configuration and its precision
    "compile", "warmup", "steps", "sampling_batch", "sampling_batches", "sampling_steps", "n_samples", "feature_extractor",
)  # fmt: skip
PARTS = ("train", "sample", "evaluate", "scaling")
COMPUTE = ("forward", "backward", "graph", "network", "decoder", "features")  # sections that are networks


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
    flags.add_extractor_flag(parser, "mnist")
    parser.add_argument("--processes", nargs="+", type=flags.at_least(1), default=[1, 2], help="of scaling (default: 1 2)")
    parser.add_argument("--vary", nargs="+", metavar=("KEY", "VALUE"), default=[], help="all of it for each value of a key")
    flags.add_compile_flag(parser)
    flags.add_output_flag(parser, use="output folder (default: only printed)", required=False)
    args = parser.parse()
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
        before, now = (shlex.join([r.get("config") or "defaults", *r.get("overrides", [])]) for r in (record, vars(args)))
        if before != now:
            raise UserError(f"--out {args.out}: holds a benchmark of {before}, now {now}; name another folder")
        if record.get("plan", plan) != plan:
            raise UserError(f"--out {args.out}: holds a benchmark with other flags; name another folder")


def plan_of(args) -> dict[str, dict]:
    """The jobs by name, for each value of --vary. Raises UserError for a wrong key."""
    key, *values = args.vary or [""]
    plan: dict[str, dict] = {}
    for extra in [[f"{key}={value}"] for value in values] or [[]]:
        overrides = [*args.overrides, *extra]
        loading.load(args.config, overrides)
        for name, job in jobs(args).items():
            plan[", ".join([name, *extra])] = {**settings_of(args, job["kind"]), **job, "overrides": overrides}
    return plan


def settings_of(args, kind: str) -> dict[str, Any]:
    """The flags that a job of this kind depends on."""
    of_kind = {
        "train": {"steps": args.steps},
        "sample": {
            "sampling_batch": args.sampling_batch, "sampling_batches": args.sampling_batches,
            "sampling_steps": args.sampling_steps,
        },
        "evaluate": {
            "sampling_batch": args.sampling_batch, "sampling_steps": args.sampling_steps, "n_samples": args.n_samples,
            "feature_extractor": args.feature_extractor,
        },
    }  # fmt: skip
    return {"compile": args.compile, "warmup": args.warmup, **of_kind[kind]}


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
    rows = [medians(name, job, results[name], costs[str(job["overrides"])], ceilings) for name, job in plan.items()]
    for row in rows:
        alike = [r for r in rows if (r["kind"], r["overrides"]) == (row["kind"], row["overrides"])]
        slow = next((r for r in alike if r["variant"] == "eager"), None)
        row["ratio"] = row["images_per_second"] / slow["images_per_second"] if slow else None
    result = {"machine": machine(), "config": args.config, "overrides": args.overrides, "plan": plan, "costs": costs,
              "ceilings": ceilings, "rows": rows, "rounds": results}  # fmt: skip
    text = report(result)
    print(text)
    train = ["train.py", *args.typed("config"), *args.overrides]
    command = commands.command(*train, "-e", files.free_folder(Path("runs") / Path(args.config or "run").stem))
    where = f" in {args.out}" if args.out else ""
    if args.out:
        files.write_text(args.out / "benchmark.json", json.dumps(result, indent=1))
        files.write_text(args.out / "benchmark.md", text + "\n")
    print(messages.summary(f"{len(rows)} row(s){where}", args.start, f"train this configuration with: {command}"))


def jobs(args) -> dict[str, dict]:
    """The jobs, which take turns: name -> job."""
    plan: dict[str, dict] = {}
    for kind in [part for part in args.parts if part in ("train", "sample")]:
        if args.against:
            plan[f"{kind}, eager, fp32"] = {"kind": kind, "variant": "eager", "precision": "no", "processes": 1}
        for p in args.precisions:
            plan[f"{kind}, {name_of(p)}"] = {"kind": kind, "variant": "project", "precision": p, "processes": 1}
    if "evaluate" in args.parts:
        for p in args.precisions:
            plan[f"evaluate, {name_of(p)}"] = {"kind": "evaluate", "variant": "project", "precision": p, "processes": 1}
    if "scaling" in args.parts:
        for p in args.precisions:
            for n in args.processes:
                job = {"kind": "train", "variant": "project", "precision": p, "processes": n}
                plan[f"train, {name_of(p)}, {n} process{'es' * (n > 1)}"] = job
    return plan


def run_job(job: dict, args, scratch: Path) -> dict:
    """The result of a job with the configuration of the command line."""
    return start_job({"overrides": args.overrides, "config": args.config, **job}, scratch)


def medians(name: str, job: dict, results: list[dict], cost: dict, ceilings: dict) -> dict:
    """Medians over the rounds of a job, and what follows from them."""
    laps = [lap for r in results for lap in r["laps"]]
    per_lap = results[0]["images_per_lap"]
    seconds = {key: sum(r["seconds"].get(key, 0.0) for r in results) for r in results for key in r["seconds"]}
    total = sum(seconds.values())
    rate = per_lap / statistics.median(laps)
    # Of flow matching there are three passes, with the two of a backward pass; the plain loop trains nothing else
    passes = cost["passes"] / PASSES if job["variant"] == "project" else 1
    flops = {"train": cost["training"] * passes, "sample": cost["forward"] * results[0]["forwards"]}.get(job["kind"])
    gpus = job["processes"] if ceilings["device"] == "cuda" else 1  # one a process; on a CPU all share the machine
    ceiling = max(ceilings[name_of(job["precision"])].values())
    return {
        "name": name, **job, "images_per_second": rate, "spread": [per_lap / max(laps), per_lap / min(laps)],
        "flops_per_second": rate * flops if flops else None,
        "of_ceiling": rate * flops / ceiling / gpus if flops else None,
        "outside": 1 - sum(seconds.get(key, 0.0) for key in COMPUTE) / total if total else None,
        "shares": {key: value / total for key, value in sorted(seconds.items(), key=lambda item: -item[1])} if total else {},
        "peak_memory_gib": max(r["peak_memory_gib"] for r in results),
        "seconds_to_first_step": min(r["seconds_to_first_step"] for r in results),
    }  # fmt: skip


def report(result: dict) -> str:
    """The tables as Markdown."""
    host, ceilings = result["machine"], result["ceilings"]
    lines = [f"{host['device']}, {host['cores']} cores, torch {host['torch']}", ""]
    for overrides, cost in result["costs"].items():
        cfg = loading.load(result["config"], ast.literal_eval(overrides))
        lines.append(
            f"- {result['config']} {overrides}: {cfg.model.name} of {cost['parameters'] / 1e6:.1f} M parameters, "
            f"{cost['forward'] / 1e9:.2f} GFLOP an image forward, {cost['training'] / 1e9:.2f} forward and backward; "
            f"training batches of {cfg.train.batch_size}"
        )
    lines += [
        "",
        table.markdown([["precision", "matrix product, GFLOP/s", "convolution, GFLOP/s"],
                        *([p, f"{ceilings[p]['matmul'] / 1e9:.0f}", f"{ceilings[p]['convolution'] / 1e9:.0f}"]
                          for p in ceilings if p != "device")]),
        "",
    ]  # fmt: skip
    for kind, row in {row["kind"]: row for row in result["rows"]}.items():
        lines.append(f"- {kind}: " + ", ".join(f"{name} {row[name]}" for name in SETTINGS if name in row))
    lines.append("")
    head = ["job", "images/s", "slowest to fastest step", "ratio to eager", "GFLOP/s", "of the ceiling", "outside the networks",
            "peak GiB", "first step, s"]  # fmt: skip
    cells = [head]
    for r in result["rows"]:
        cells.append([
            r["name"], f"{r['images_per_second']:.2f}", "{:.2f} - {:.2f}".format(*r["spread"]),
            f"{r['ratio']:.2f}" if r["ratio"] else "", f"{r['flops_per_second'] / 1e9:.0f}" if r["flops_per_second"] else "",
            f"{r['of_ceiling']:.2f}" if r["of_ceiling"] else "", f"{r['outside']:.1%}" if r["outside"] is not None else "",
            f"{r['peak_memory_gib']:.2f}", f"{r['seconds_to_first_step']:.1f}",
        ])  # fmt: skip
    lines += [table.markdown(cells), ""]
    for r in result["rows"]:
        if r["shares"]:
            shares = ", ".join(f"{key} {value:.1%}" for key, value in r["shares"].items() if value >= 0.0005)
            lines.append(f"- {r['name']}: {shares}")
    return "\n".join(lines)


def machine() -> dict:
    name = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").is_file():
        models = [x.partition(":")[2].strip() for x in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in x]
        name = models[0] if models else name
    if torch.cuda.is_available():
        name = torch.cuda.get_device_name()
    return {"device": name, "cores": os.cpu_count(), "torch": torch.__version__}


if __name__ == "__main__":
    cli_main(main)
