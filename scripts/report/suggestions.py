"""Commands that go on with a run: train it again, resume it, sample from its weights."""

import shlex
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from configs import schema
from datasets import captions
from flow.evaluation import classifiers
from flow.runtime import commands, files
from flow.solvers import SOLVERS
from flow.source import GAUSSIAN
from flow.training import run_dir

SAMPLE = "sample"  # what the command of further images is called
TRAJECTORY = "trajectory"  # what the command of the grids in samples/trajectory is called
TRAIN = ["train.py"]  # what trains a flow
LAUNCHER = "LAUNCHER_OF_THE_RUN"  # in the place of one that is not known


def suggest(
    folder: Path,
    environment: dict[str, Any],
    values: dict[str, Any],
    interpolations: dict[str, Any],
    class_names: Sequence[str] | None,
    best: dict | None,
) -> dict[str, str]:
    """Commands that work as printed in this folder and shell, by what they are for; those that train a run on several machines
    or with sharded weights begin with LAUNCHER.

    `environment` is that of the last start; `values` the configuration by dotted key, with `interpolations` once more;
    `class_names` those of the weights of a flow, None where there are none to sample from; `best` the best entry of its tables.
    """
    folder = files.resolve_unnamed(folder)
    program = _program(environment)
    launcher = _launcher(environment)
    typed = [shlex.quote(f"{key}={value}") for key, value in interpolations.items()]  # a stored configuration resolves nothing
    copy = files.free_folder(folder.with_name(f"{folder.name}_again"))
    again: list[str | Path] = [*program, "-c", folder / "config.yaml", "-e", copy]
    suggested = {
        "train again": commands.command(*again, launcher=launcher),
        "resume": " ".join([run_dir.resume_command(folder, " ".join(program), launcher=launcher), *typed]),
    }
    if class_names is not None:
        uses = _uses(folder, values, class_names, best)
        read = [word for key, word in zip(interpolations, typed, strict=True) if key.split(".")[0] in schema.OF_WEIGHTS]
        suggested |= {key: " ".join([command, *read]) for key, command in uses.items()}
    return suggested


def _launcher(environment: dict[str, Any]) -> str:
    """What starts as many processes as the run had. Of several machines or sharded weights only its own launcher knows all."""
    processes = environment.get("processes")
    if environment.get("sharded") or environment.get("processes_per_machine", processes) != processes:
        return LAUNCHER
    return commands.torchrun(processes) if isinstance(processes, int) and processes > 1 else commands.interpreter()


def trains_flow(environment: dict[str, Any]) -> bool:
    """Whether a run with this environment trains a flow, whose weights can be sampled from."""
    return _program(environment) == TRAIN


def _uses(folder: Path, values: dict[str, Any], class_names: Sequence[str], best: dict | None) -> dict[str, str]:
    """What can be done with the weights of a flow. Images are sampled as those of the `best` entry of its tables were, where
    solver, steps and guidance scale say all of it."""
    prompts, solver = [], []
    further = ("guidance_interval", "guide", "source", "ema_width")
    if best and best["method"] in SOLVERS and best["steps"] and not any(best[name] for name in further):
        solver = ["--sampling_method", best["method"], "--sampling_steps", str(best["steps"])]
        solver += commands.condition_flags(1 if best["guidance_scale"] is None else best["guidance_scale"])
    if values.get("model.args.max_prompt_bytes"):
        prompts = ["--prompts", captions.plain(class_names[0])] if class_names else []
    data, extractor = values.get("data.name"), values.get("evaluate.feature_extractor")
    extractor = data if data in list(classifiers.SIDES) else extractor
    flags = ["--feature_extractor", str(extractor)] if extractor and data != "toys" else []
    if values.get("flow.source.name", GAUSSIAN) == GAUSSIAN:  # others start at as many samples as there are
        flags += ["--n_samples", str(values.get("evaluate.n_samples", 10_000))]
    solvers = ["--methods", "euler", "heun", "--sampling_steps", "5", "10", "20"]
    animate: list[str | Path] = ["-m", "scripts.animate", "--weights", folder]
    return {
        SAMPLE: commands.sample_command(folder, folder.name, *solver, *prompts),
        "evaluate": commands.command("evaluate.py", "--weights", folder, *solvers, *flags),
        "animate": commands.command(*animate, "--out", files.free_folder(folder / "animation"), *prompts),
        TRAJECTORY: commands.command(*animate, "--trajectory_grids", *prompts),
    }


def _program(environment: dict[str, Any]) -> list[str]:
    """What trains the run, from the command that is recorded."""
    with suppress(ValueError, IndexError):  # a command that no shell could read, or none
        if Path(shlex.split(str(environment.get("command", "")))[0]).stem == "train_vae":
            return ["-m", "scripts.train_vae"]
    return TRAIN
