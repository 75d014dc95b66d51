"""The rows and tables of a benchmark."""

import ast
import os
import platform
import statistics
from pathlib import Path

import torch

from configs import loading
from flow.evaluation import table
from flow.losses.base import PASSES
from scripts.benchmark.trial import name_of

SETTINGS = (  # of a job, besides its configuration and its precision
    "compile", "warmup", "steps", "sampling_batch", "sampling_batches", "sampling_steps", "n_samples", "feature_extractor",
)  # fmt: skip
COMPUTE = ("forward", "backward", "graph", "network", "decoder", "features")  # sections that are networks


def machine() -> dict:
    """What the benchmark runs on."""
    name = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").is_file():
        models = [x.partition(":")[2].strip() for x in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in x]
        name = models[0] if models else name
    if torch.cuda.is_available():
        name = torch.cuda.get_device_name()
    return {"device": name, "cores": os.cpu_count(), "torch": torch.__version__}


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


def markdown(result: dict) -> str:
    """The tables as Markdown."""
    host, ceilings = result["machine"], result["ceilings"]
    lines = [f"{host['device']}, {host['cores']} cores, torch {host['torch']}", ""]
    for overrides, cost in result["costs"].items():
        cfg = loading.load(result["config"], ast.literal_eval(overrides))
        lines.append(
            f"- {result['config'] or 'defaults'} {overrides}: {cfg.model.name} of {cost['parameters'] / 1e6:.1f} M parameters, "
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
