"""The jobs of a benchmark, by name, as the flags ask for them."""

from typing import Any

from configs import loading
from scripts.benchmark.trial import name_of


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
