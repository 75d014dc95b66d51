"""Speed of training, sampling and evaluation on this machine: `python -m scripts.benchmark -c configs/cifar10.yaml`.

What is measured are train.py, sample.py and evaluate.py themselves, each in a process of its own, with clocks around the
functions that they call. With `--against eager` the same network also runs in the loop of scripts/plain_loop.py. The jobs
take turns, `--rounds` times, and the median of all their steps counts. FLOPs are those of torch.utils.flop_counter, and the
ceiling is the fastest matrix product or convolution of the machine in the same precision. `--out` gets benchmark.json and
benchmark.md.
"""

import contextlib
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from configs import schema
from configs.schema import Config, UserError
from flow.engine import cli, files, runtime
from flow.evaluation import table

EXAMPLES = """\
  python -m scripts.benchmark -c configs/mnist_mini_cond.yaml --against eager
  python -m scripts.benchmark -c configs/cifar10.yaml --parts train --precisions no bf16 --against eager \\
      --steps 2 --rounds 3 --out docs/benchmark train.batch_size=32
  python -m scripts.benchmark -c configs/mnist_mini_cond.yaml --parts scaling --processes 1 2 --precisions bf16"""
PARTS = ("train", "sample", "evaluate", "scaling")
COMPUTE = ("forward", "backward", "network", "features")  # sections that are networks


def parse_args():
    parser = cli.Parser(__doc__, EXAMPLES)
    parser.add_argument("-c", "--config", metavar="YAML", help="of the training that is measured")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=["train", "sample"], help="(default: train sample)")
    parser.add_argument("--precisions", nargs="+", choices=schema.MIXED_PRECISIONS, default=["no", "bf16"])
    parser.add_argument("--against", choices=("eager",), help="also the loop that a user would write, in fp32")
    parser.add_argument("--steps", type=cli.at_least(1), default=10, help="training steps a round (default: 10)")
    parser.add_argument("--warmup", type=cli.at_least(1), default=2, help="steps or batches that do not count (default: 2)")
    parser.add_argument("--rounds", type=cli.at_least(1), default=3, help="turns of each job (default: 3)")
    parser.add_argument("--sampling_batch", type=cli.at_least(1), default=32, help="(default: 32)")
    parser.add_argument("--sampling_batches", type=cli.at_least(1), default=3, help="batches a round (default: 3)")
    parser.add_argument("--sampling_steps", type=cli.at_least(1), default=5, help="Euler steps (default: 5)")
    parser.add_argument("--n_samples", type=cli.at_least(4), default=500, help="images of evaluate (default: 500)")
    parser.add_argument("--feature_extractor", default="mnist", metavar="NAME", help="of evaluate (default: mnist)")
    parser.add_argument("--processes", nargs="+", type=cli.at_least(1), default=[1, 2], help="of scaling (default: 1 2)")
    parser.add_argument("--out", type=Path, metavar="DIR", help="output folder (default: only printed)")
    parser.add_argument("--job", help="(used by the script itself)")
    args = parser.parse()
    if "train.steps" in " ".join(args.overrides):
        raise UserError("train.steps: --steps says how many are measured")
    return args


def main() -> None:
    args = parse_args()
    if args.job:
        run_job(json.loads(args.job))
        return
    cfg = schema.load(args.config, args.overrides)
    plan = jobs(args)
    with tempfile.TemporaryDirectory() as scratch:
        found: dict[str, list[dict]] = {name: [] for name in plan}
        cost = start_job({"kind": "cost"}, args, Path(scratch))
        ceilings = start_job({"kind": "ceilings", "precisions": args.precisions}, args, Path(scratch))
        for turn in range(args.rounds):
            for name, job in plan.items():
                print(f"round {turn + 1} of {args.rounds}: {name}", file=sys.stderr, flush=True)
                found[name].append(start_job(job, args, Path(scratch)))
    rows = [summary(name, plan[name], results, cost, ceilings, args.against) for name, results in found.items()]
    for row in rows:
        slow = next((r for r in rows if r["kind"] == row["kind"] and r["what"] == "eager"), None)
        row["ratio"] = row["images_per_second"] / slow["images_per_second"] if slow else None
    result = {"machine": machine(), "config": args.config, "overrides": args.overrides, "batch": cfg.train.batch_size,
              "cost": cost, "ceilings": ceilings, "rows": rows, "rounds": found}  # fmt: skip
    text = report(cfg, result)
    print(text)
    if args.out:
        args.out.mkdir(parents=True, exist_ok=True)
        files.write_text(args.out / "benchmark.json", json.dumps(result, indent=1))
        files.write_text(args.out / "benchmark.md", text + "\n")


def jobs(args) -> dict[str, dict]:
    """What is run in turn: name -> job."""
    plan: dict[str, dict] = {}
    for kind in [part for part in args.parts if part in ("train", "sample")]:
        if args.against:
            plan[f"{kind}, eager, fp32"] = {"kind": kind, "what": "eager", "precision": "no", "processes": 1}
        for p in args.precisions:
            plan[f"{kind}, {name_of(p)}"] = {"kind": kind, "what": "ours", "precision": p, "processes": 1}
    if "evaluate" in args.parts:
        for p in args.precisions:
            plan[f"evaluate, {name_of(p)}"] = {"kind": "evaluate", "what": "ours", "precision": p, "processes": 1}
    if "scaling" in args.parts:
        for p in args.precisions:
            for n in args.processes:
                job = {"kind": "train", "what": "ours", "precision": p, "processes": n}
                plan[f"train, {name_of(p)}, {n} process{'es' * (n > 1)}"] = job
    return plan


def name_of(precision: str) -> str:
    return "fp32" if precision == "no" else precision


def start_job(job: dict, args, scratch: Path) -> dict:
    """The result of a job in a process of its own (or several)."""
    result = scratch / "result.json"
    result.unlink(missing_ok=True)
    job = {
        **job, "config": args.config, "overrides": args.overrides, "result": str(result), "scratch": str(scratch),
        "steps": args.steps, "warmup": args.warmup, "sampling_batch": args.sampling_batch, "n_samples": args.n_samples,
        "sampling_batches": args.sampling_batches, "sampling_steps": args.sampling_steps,
        "feature_extractor": args.feature_extractor, "started": time.time(),
    }  # fmt: skip
    launcher = [sys.executable]
    if job.get("processes", 1) > 1:
        launcher += ["-m", "torch.distributed.run", "--nproc_per_node", str(job["processes"])]
        launcher += ["--rdzv_backend", "c10d", "--rdzv_endpoint", "localhost:0"]
    done = subprocess.run(
        [*launcher, "-m", "scripts.benchmark", "--job", json.dumps(job)], capture_output=True, text=True, check=False
    )
    if done.returncode or not result.is_file():
        lines = [line for line in done.stderr.splitlines() if line.startswith("error: ")] or done.stderr.splitlines()[-1:]
        raise UserError(f"{job['kind']}: {(lines or ['it ended without a word'])[0].removeprefix('error: ')}")
    return json.loads(result.read_text(encoding="utf-8"))


def summary(name: str, job: dict, results: list[dict], cost: dict, ceilings: dict, against: str | None) -> dict:
    """Medians over the rounds of a job, and what follows from them."""
    laps = [lap for r in results for lap in r["laps"]]
    per_lap = results[0]["images_per_lap"]
    seconds = {key: sum(r["seconds"].get(key, 0.0) for r in results) for r in results for key in r["seconds"]}
    total = sum(seconds.values())
    rate = per_lap / statistics.median(laps)
    flops = {"train": cost["training"], "sample": cost["forward"] * results[0]["forwards"]}.get(job["kind"])
    ceiling = max(ceilings[name_of(job["precision"])].values())
    return {
        "name": name, **job, "images_per_second": rate, "spread": [per_lap / max(laps), per_lap / min(laps)],
        "flops_per_second": rate * flops if flops else None,
        "of_ceiling": rate * flops / ceiling / job["processes"] ** bool(ceilings["device"] == "cuda") if flops else None,
        "outside": 1 - sum(seconds.get(key, 0.0) for key in COMPUTE) / total if total else None,
        "shares": {key: value / total for key, value in sorted(seconds.items(), key=lambda item: -item[1])} if total else {},
        "peak_memory_gib": max(r["peak_memory_gib"] for r in results),
        "seconds_to_first_step": min(r["seconds_to_first_step"] for r in results),
    }  # fmt: skip


def report(cfg: Config, result: dict) -> str:
    """The tables as Markdown."""
    host, cost, ceilings = result["machine"], result["cost"], result["ceilings"]
    lines = [
        f"{host['device']}, {host['cores']} cores, torch {host['torch']}; {cfg.model.name} of {cost['parameters'] / 1e6:.1f} M "
        f"parameters, {cost['forward'] / 1e9:.2f} GFLOP an image forward, {cost['training'] / 1e9:.2f} forward and backward; "
        f"training batches of {result['batch']}.",
        "",
        table.markdown([["precision", "matrix product, GFLOP/s", "convolution, GFLOP/s"],
                        *([p, f"{ceilings[p]['matmul'] / 1e9:.0f}", f"{ceilings[p]['convolution'] / 1e9:.0f}"]
                          for p in ceilings if p != "device")]),
        "",
    ]  # fmt: skip
    head = ["job", "images/s", "slowest to fastest step", "ratio", "GFLOP/s", "of the ceiling", "outside the networks",
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
    import torch

    name = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").is_file():
        models = [x.partition(":")[2].strip() for x in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in x]
        name = models[0] if models else name
    if torch.cuda.is_available():
        name = torch.cuda.get_device_name()
    return {"device": name, "cores": os.cpu_count(), "torch": torch.__version__}


# ---- in the process of a job ----


class Enough(Exception):
    """Ends a training that has been measured."""


def run_job(job: dict) -> None:
    """Do it and write its result."""
    kind = job["kind"] + "_" + job["what"] if "what" in job else job["kind"]
    found = {
        "cost": cost_job, "ceilings": ceilings_job, "train_ours": train_job, "train_eager": plain_train_job,
        "sample_ours": sample_job, "sample_eager": plain_sample_job, "evaluate_ours": evaluate_job,
    }[kind](job)  # fmt: skip
    if int(os.environ.get("RANK", "0")) == 0:
        Path(job["result"]).write_text(json.dumps(found), encoding="utf-8")


def measured(job: dict, watch, images_per_lap: int, first_step: float, forwards: int = 1) -> dict:
    """The result of a job of steps or batches."""
    import torch

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    if torch.cuda.is_available():
        peak = torch.cuda.max_memory_allocated()
    return {
        "laps": watch.laps, "seconds": dict(watch.seconds), "images_per_lap": images_per_lap, "forwards": forwards,
        "peak_memory_gib": peak / 2**30, "seconds_to_first_step": first_step - job["started"],
    }  # fmt: skip


def cost_job(job: dict) -> dict:
    """Parameters of the network and floating-point operations of one image."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    cfg, shape, _ = material(job)
    with torch.device("meta"):
        import models

        net = models.build(cfg.model.name, shape, cfg.model.args)
        x, t, y = torch.empty(1, *shape), torch.empty(1), condition(net, 1)
        with FlopCounterMode(display=False) as forward:
            out = net(x, t, y)
        with FlopCounterMode(display=False) as backward:
            out.sum().backward()
    passes = forward.get_total_flops(), backward.get_total_flops()
    return {"parameters": sum(p.numel() for p in net.parameters()), "forward": passes[0], "training": sum(passes)}


def ceilings_job(job: dict) -> dict:
    """FLOP/s of the fastest of several large matrix products and of several 3x3 convolutions, by precision."""
    import torch
    import torch.nn.functional as F

    runtime.set_threads()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    large = 4 if device.type == "cuda" else 1
    found: dict = {"device": device.type}
    for precision in job["precisions"]:
        dtype = {"no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]

        def best(work: float, function, dtype=dtype) -> float:
            rates = []
            for _ in range(8):
                start = time.perf_counter()
                function()
                if device.type == "cuda":
                    torch.cuda.synchronize()
                rates.append(work / (time.perf_counter() - start))
            return max(rates)

        products, convolutions = [], []
        for n in (1024 * large, 2048 * large):
            a, b = torch.randn(2, n, n, device=device).to(dtype)
            products.append(best(2 * n**3, lambda a=a, b=b: a @ b))
        for channels, side in ((128, 32), (256, 16), (512, 16)):
            x = torch.randn(16 * large, channels, side, side, device=device).to(dtype)
            w = torch.randn(channels, channels, 3, 3, device=device).to(dtype)
            for layout in (torch.contiguous_format, torch.channels_last):
                x, w = x.to(memory_format=layout), w.to(memory_format=layout)
                work = 2 * 9 * len(x) * channels**2 * side**2
                convolutions.append(best(work, lambda x=x, w=w: F.conv2d(x, w, padding=1)))
        found[name_of(precision)] = {"matmul": max(products), "convolution": max(convolutions)}
    return found


def material(job: dict):
    """The configuration, the shape of its images and its data set."""
    import datasets

    cfg = schema.load(job["config"], job["overrides"])
    with runtime.blame("data"):
        data = datasets.build(cfg.data.name, cfg.data.root, cfg.data.args)
    return cfg, data.image_shape, data


def condition(net, n: int):
    import torch

    if net.prompt_bytes:
        return torch.ones(n, net.prompt_bytes, dtype=torch.long)
    return torch.zeros(n, dtype=torch.long) if net.num_classes is not None else None


def train_job(job: dict) -> dict:
    """train.py itself; data, noise, times, labels, path and loss, forward, backward, clipping, optimizer, EMA and logging
    are sections, "other" is the loop between them."""
    import torch
    from accelerate import Accelerator
    from accelerate.optimizer import AcceleratedOptimizer

    import train
    from flow.engine.ema import Ema
    from flow.engine.loader import Loader
    from flow.engine.tracker import Meter, Tracker
    from scripts.stopwatch import Stopwatch

    watch = Stopwatch(synchronise=True)
    first_step = 0.0
    steps, make_pairing, make_objective = Loader.steps, train.pairing_of, train.objective

    def timed_steps(loader, first: int, last: int):
        nonlocal first_step
        batches = steps(loader, first, last)
        for done in range(job["warmup"] + job["steps"]):
            with watch.section("data"):
                batch = next(batches)
            yield batch
            watch.lap()
            first_step = first_step or time.time()
            if done == job["warmup"] - 1:
                watch.restart()
        raise Enough

    def timed_pairing(*args):
        pairing = make_pairing(*args)
        pairing.noise = watch.watch("noise", pairing.noise)
        return pairing

    def timed_objective(*args, **kwargs):
        training = make_objective(*args, **kwargs)
        loss = training.loss
        training.loss = watch.watch("path and loss", lambda model, *rest: loss(watch.watch("forward", model), *rest))
        return training

    Loader.steps, train.pairing_of, train.objective = timed_steps, timed_pairing, timed_objective
    for owner, name, section in [
        (train.time_sampler, "sample", "times"), (train, "condition", "labels"), (train, "drop_labels", "labels"),
        (Accelerator, "backward", "backward"), (Accelerator, "clip_grad_norm_", "clipping"),
        (AcceleratedOptimizer, "step", "optimizer"), (AcceleratedOptimizer, "zero_grad", "optimizer"),
        (Ema, "update", "EMA"), (Meter, "add", "logging"), (Meter, "add_grad_norm", "logging"),
        (Meter, "check", "logging"), (Meter, "read", "logging"), (Tracker, "log", "logging"),
    ]:  # fmt: skip
        setattr(owner, name, watch.watch(section, getattr(owner, name)))
    cfg = schema.load(job["config"], job["overrides"])
    with tempfile.TemporaryDirectory() as scratch:
        config = ["-c", job["config"]] if job["config"] else []
        sys.argv = [
            "train.py", *config, "-e", f"{scratch}/run", "-mp", job["precision"], *job["overrides"], "train.log_with=[]",
            "train.sample_every_steps=0", "train.checkpoint_every_steps=0", "train.steps=1_000_000_000",
        ]  # fmt: skip
        with contextlib.suppress(Enough):
            train.main()
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    return measured(job, watch, cfg.train.batch_size, first_step)


def plain_train_job(job: dict) -> dict:
    import torch

    import models
    from scripts import plain_loop
    from scripts.stopwatch import Stopwatch

    cfg, shape, data = material(job)
    net = models.build(cfg.model.name, shape, cfg.model.args)
    if net.prompt_bytes or not hasattr(data, "images") or data.images.dtype != torch.uint8:
        raise UserError("--against eager: is for networks without prompts on images in memory")
    labels = data.labels if net.num_classes is not None else None
    watch = Stopwatch(synchronise=True)
    first_step = 0.0
    for done, _ in enumerate(plain_loop.train(net, data.images, labels, cfg.train.batch_size, cfg.optimizer.lr)):
        watch.lap()
        first_step = first_step or time.time()
        if done == job["warmup"] - 1:
            watch.restart()
        if done == job["warmup"] + job["steps"] - 1:
            break
    watch.seconds.clear()
    return measured(job, watch, cfg.train.batch_size, first_step)


def blank_snapshot(job: dict) -> Path:
    """Untrained weights of the configuration, as a file."""
    import models
    from flow.engine import snapshot

    path = Path(job["scratch"]) / "blank.safetensors"
    if not path.is_file():
        cfg, shape, _ = material(job)
        net = models.build(cfg.model.name, shape, cfg.model.args)
        snapshot.save(path, net.state_dict(), cfg, shape, 0, 1)
    return path


def sample_job(job: dict) -> dict:
    """sample.py itself; "network" is a section."""
    import sample
    from flow.guidance import GuidedVelocity
    from scripts.stopwatch import Stopwatch

    watch = Stopwatch(synchronise=True)
    first_batch = 0.0
    generate = sample.generate

    def timed_generate(*args):
        nonlocal first_batch
        for done, batch in enumerate(generate(*args)):
            yield batch
            watch.lap()
            first_batch = first_batch or time.time()
            if done == job["warmup"] - 1:
                watch.restart()

    sample.generate = timed_generate
    GuidedVelocity._forward = watch.watch("network", GuidedVelocity._forward)
    weights = blank_snapshot(job)
    with tempfile.TemporaryDirectory() as scratch:
        sys.argv = [
            "sample.py", "--weights", str(weights), "--save_dir", f"{scratch}/out", "-mp", job["precision"],
            "--n_samples", str(job["sampling_batch"] * (job["warmup"] + job["sampling_batches"])),
            "--bspp", str(job["sampling_batch"]), "--sampling_steps", str(job["sampling_steps"]),
        ]  # fmt: skip
        if schema.load(job["config"], job["overrides"]).model.args.get("prompt_bytes"):
            sys.argv += ["--prompts", "a"]
        sample.main()
    return measured(job, watch, job["sampling_batch"], first_batch, job["sampling_steps"])


def plain_sample_job(job: dict) -> dict:
    import models
    from scripts import plain_loop
    from scripts.stopwatch import Stopwatch

    cfg, shape, _ = material(job)
    net = models.build(cfg.model.name, shape, cfg.model.args)
    watch = Stopwatch(synchronise=True)
    first_batch = 0.0
    with tempfile.TemporaryDirectory() as scratch:
        batches = plain_loop.sample(net, shape, net.num_classes, job["sampling_batch"], job["sampling_steps"], Path(scratch))
        for done, _ in enumerate(batches):
            watch.lap()
            first_batch = first_batch or time.time()
            if done == job["warmup"] - 1:
                watch.restart()
            if done == job["warmup"] + job["sampling_batches"] - 1:
                break
    watch.seconds.clear()
    return measured(job, watch, job["sampling_batch"], first_batch, job["sampling_steps"])


def evaluate_job(job: dict) -> dict:
    """evaluate.py itself, from noise to distance; "network" and "features" are sections."""
    import evaluate
    from flow.evaluation.features import Extractor
    from flow.guidance import GuidedVelocity
    from scripts.stopwatch import Stopwatch

    watch = Stopwatch(synchronise=True)
    ready = 0.0
    measure = evaluate.measure

    def timed_measure(*args):
        nonlocal ready
        ready = time.time()
        watch.restart()
        found = measure(*args)
        watch.lap()
        return found

    evaluate.measure = timed_measure
    GuidedVelocity._forward = watch.watch("network", GuidedVelocity._forward)
    Extractor.__call__ = watch.watch("features", Extractor.__call__)
    weights = blank_snapshot(job)
    with tempfile.TemporaryDirectory() as scratch:
        sys.argv = [
            "evaluate.py", "--weights", str(weights), "--out", f"{scratch}/out", "-mp", job["precision"], "--metrics", "fid",
            "--n_samples", str(job["n_samples"]), "--bspp", str(job["sampling_batch"]),
            "--sampling_steps", str(job["sampling_steps"]), "--feature_extractor", job["feature_extractor"],
        ]  # fmt: skip
        evaluate.main()
    return measured(job, watch, job["n_samples"], ready, job["sampling_steps"])


if __name__ == "__main__":
    runtime.run(main)
