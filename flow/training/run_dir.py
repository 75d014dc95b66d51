"""The folder of a run: refused where it exists, resumed where asked, described by config.yaml and environment.json."""

import json
import os
import platform
import shlex
import subprocess
import sys
import threading
import time
from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from configs import keys, loading, schema, stored
from configs.errors import UserError
from configs.schema import Kind
from flow.runtime import commands, distributed, files, lock, step_names
from flow.runtime.errors import error_context
from flow.training import checkpoint
from flow.training.trackers import TRACKERS

# Keys whose value must be that of the checkpoint: otherwise weights or optimizer would not fit, or images would repeat.
FIXED = (
    "seed", "data.name", "data.args", "model.name", "model.args", "train.batch_size", "ema.half_life_images",
    "ema.power_widths", "flow.time_sampler", "flow.time_sampler_args", "flow.path", "flow.prediction", "flow.source.name",
    "flow.source.args", "flow.coupling", "flow.coupling_args", "loss.name", "loss.args", "optimizer.name",
    "autoencoder.channels", "autoencoder.latent_channels", "autoencoder.blocks", "autoencoder.distance",
    "autoencoder.kl_weight", "autoencoder.lpips_weight",
)  # fmt: skip
NEEDS_CONFIG = "-c: a configuration is needed, e.g. -c configs/digits.yaml (or -e DIR -r latest to resume)"
PLACES = ("path", "held_out")  # arguments of data sets that may change, as data may move to another disk; not of pairs
# A flow reads train.init_from once, before its first checkpoint: with another value after it, config.yaml would name weights
# that the run did not start from. An autoencoder reads its network's shape from there at every start; that path may change.
FIXED_BY_CHECKPOINT = (*FIXED, "train.init_from")


@contextmanager
def locked_run(args: Namespace, kind: type[Kind]) -> Iterator[tuple[Path, Kind, Accelerator]]:
    """Run folder, configuration and accelerator of a trainer's command line, as `locked`."""
    with locked(partial(open_run, args.config, args.exp_dir, args.resume, args.overrides, kind)) as (run_dir, cfg, accelerator):
        if args.resume and args.config and (changes := changes_by_yaml(run_dir, cfg, args.overrides)):
            what = f"-c {args.config} changes {', '.join(changes)}"
            accelerator.print(f"note: {what}; resume without -c to keep what the run had")
        yield run_dir, cfg, accelerator


@contextmanager
def locked(find_run: Callable[[], tuple[Path, Kind]]) -> Iterator[tuple[Path, Kind, Accelerator]]:
    """The run that `find_run` finds, and its accelerator; inside the block no other process writes to its folder.

    An error of the file system inside the block becomes a UserError that also names the latest checkpoint.
    """
    run_dir, cfg = find_run()
    accelerator = distributed.build_training_accelerator(cfg.train, run_dir, TRACKERS)  # type: ignore[attr-defined]
    with lock.folder(run_dir, accelerator):
        # Until here another process may have started a run in this folder, or resumed it.
        if (run_dir, cfg) != find_run():
            raise UserError(f"{run_dir / 'config.yaml'}: another process has changed it; start this command again")
        distributed.check_same(accelerator, loading.dump(cfg), f"the configuration of {run_dir}")
        try:
            with _quiet_writer_threads():
                yield run_dir, cfg, accelerator
        except OSError as error:
            names_file = error.filename or str(error).startswith(str(run_dir))
            reason = f"{'' if names_file else f'{run_dir}: '}{error}"
            raise UserError(f"{reason}; {checkpoint.latest_checkpoint_hint(run_dir / 'checkpoints')}") from error


@contextmanager
def _quiet_writer_threads() -> Iterator[None]:
    """TensorBoard writes in a thread and raises its OSError again in the main one; the thread's traceback is left out."""
    hook = threading.excepthook
    threading.excepthook = lambda error: None if isinstance(error.exc_value, OSError) else hook(error)
    try:
        yield
    finally:
        threading.excepthook = hook


def open_run(
    config: str | None, exp_dir: Path | None, resume: str | None, overrides: list[str], kind: type[Kind]
) -> tuple[Path, Kind]:
    """The run folder and the configuration of this `kind` that the command line means; nothing is written.

    A new run needs a folder that does not exist; a resumed one takes its stored configuration where no -c is given.
    Raises UserError.
    """
    run_dir = _resumed_folder(config, exp_dir, resume) if resume else exp_dir or _default_folder(config)
    run_dir = files.resolve_unnamed(run_dir)  # a run is called after its folder
    if not resume:
        if not config and not overrides:
            raise UserError(NEEDS_CONFIG)
        cfg = loading.load(config, overrides, kind=kind)
        _check_is_new(run_dir)
        return run_dir, cfg
    _check_has_run(run_dir, f"-r {resume}")
    cfg = loading.load(config, overrides, kind=kind) if config else None
    before = _stored_config(run_dir, kind, stored.typed_values(cfg) if cfg else loading.overridden(overrides, kind))
    return run_dir, _resumed(run_dir, before, cfg or loading.load(None, overrides, base=before, kind=kind))


def run_of_config(config: Kind, run_dir: Path, resume: str | None) -> tuple[Path, Kind]:
    """As `open_run`, for a configuration in Python, which is copied and checked as that of a file: its values may have been set
    after it was loaded."""
    if not isinstance(config, schema.Config):
        raise UserError(f"config={config!r:.60}: must be a configuration; read one by configs.loading.load")
    typed = stored.typed_values(config)
    run_dir, cfg = files.resolve_unnamed(run_dir), loading.parse(loading.dump(config), "config", type(config), typed)
    cfg.typed = dict(getattr(config, "typed", {}))
    if not resume:
        _check_is_new(run_dir, "folder=", 'resume="latest"')
        return run_dir, cfg
    _check_has_run(run_dir, f"resume={resume}", "resume")
    if str(resume) != "latest" and _resumed_folder(None, None, str(resume)).resolve() != run_dir.resolve():
        raise UserError(f"resume={resume}: is no checkpoint of {run_dir}; name one, or start a new run with train.init_from")
    return run_dir, _resumed(run_dir, _stored_config(run_dir, type(cfg), stored.typed_values(cfg)), cfg)


def _check_is_new(run_dir: Path, key: str = "-e ", resume: str = "-r latest") -> None:
    """Raises UserError for a run folder that is a file or holds something."""
    if run_dir.is_file():
        raise UserError(f"{key}{run_dir}: is a file; name a folder")
    if run_dir.exists() and not files.is_empty_dir(run_dir):
        remedy = f"resume with {resume}, or " if (run_dir / "config.yaml").is_file() else ""
        raise UserError(f"{key}{run_dir}: exists already; {remedy}name another folder")


def _check_has_run(run_dir: Path, key: str, flag: str = "-r") -> None:
    """Raises UserError for a folder without the configuration of a run."""
    if not (run_dir / "config.yaml").is_file():
        no_files = files.is_empty_dir(run_dir) or not run_dir.exists()
        remedy = f"start one without {flag}" if no_files else "its config.yaml is missing"
        raise UserError(f"{key}: there is no run in {run_dir}; {remedy}")


def _stored_config(run_dir: Path, kind: type[Kind], confirmed: dict[str, Any]) -> Kind:
    """The configuration of a run; `confirmed` as in `loading.parse`."""
    path = run_dir / "config.yaml"
    with error_context(str(path)):
        return loading.parse(path.read_text(encoding="utf-8"), str(path), kind, confirmed)


def _resumed(run_dir: Path, before: Kind, cfg: Kind) -> Kind:
    """What a run goes on with: `cfg` with the number of classes that it had. Raises UserError as `refuse_changes`."""
    if isinstance(cfg, schema.Config) and isinstance(before, schema.Config):
        schema.keep_auto_classes(cfg, before)
    refuse_changes(before, cfg, f"the run in {run_dir} was started")
    return cfg


def changes_by_yaml(run_dir: Path, cfg: Any, overrides: list[str]) -> list[str]:
    """KEY=VALUE (was VALUE) for what is different in the stored configuration and not said by the overrides."""
    kind = type(cfg)
    before = _stored_config(run_dir, kind, stored.typed_values(cfg))
    typed = loading.overridden(overrides, kind)
    changed = [key for key in keys.all_keys(kind) if keys.get(before, key) != keys.get(cfg, key)]
    by_yaml = [key for key in changed if not any(f"{name}.".startswith(f"{key}.") for name in typed)]
    return [f"{key}={keys.get(cfg, key)} (was {keys.get(before, key)})" for key in by_yaml]


def checkpoint_to_resume(resume: str, run_dir: Path, cfg: Any) -> Path | None:
    """The checkpoint that `-r latest|PATH` means, None for a run that was cut off before its first one.

    Raises UserError where it is damaged, where resuming from it would overwrite later ones, or where it was made with
    another configuration than `cfg` in what resuming cannot change, whatever config.yaml says by now.
    """
    folder = run_dir / "checkpoints"
    named = resume != "latest" and checkpoint.is_checkpoint(Path(resume))
    path = _checkpoint_named(Path(resume), folder) if named else checkpoint.find_latest(folder)
    if path is None and any((run_dir / "snapshots").glob("step_*")):
        raise UserError(
            f"-r {resume}: {run_dir} has snapshots and no checkpoint to resume from; start a new run "
            "(train.init_from can name these weights)"
        )
    if path:
        before = checkpoint.stored_config(path, type(cfg), stored.typed_values(cfg))
        fixed = FIXED_BY_CHECKPOINT if isinstance(cfg, schema.Config) else FIXED
        refuse_changes(before, cfg, f"the checkpoint {path} was made", fixed)
    return path


def refuse_changes(stored: Any, cfg: Any, origin: str, fixed: Sequence[str] = FIXED) -> None:
    """Raises UserError for the first key that resuming cannot change and that differs; `origin` begins the reason."""
    for key in filter(keys.all_keys(type(cfg)).__contains__, fixed):
        before, now = keys.get(stored, key), keys.get(cfg, key)
        of_data = key in ("data.args", "flow.source.args") and cfg.data.name != "pairs"
        if before != now and not (of_data and _without_places(before) == _without_places(now)):
            raise UserError(f"{key}={now}: {origin} with {before}, which resuming cannot change")


def _without_places(args: dict[str, Any]) -> dict[str, Any]:
    """Arguments of a data set without where its files lie."""
    return {name: value for name, value in args.items() if name not in PLACES}


def _checkpoint_named(path: Path, folder: Path) -> Path:
    damage = checkpoint.verify(path)
    if damage:
        raise UserError(f"-r {path}: the checkpoint is damaged: {damage}")
    later = [p for p in checkpoint.list_checkpoints(folder) if step_names.step_of(p) > step_names.step_of(path)]
    if later:
        raise UserError(
            f"-r {path}: resuming from here would overwrite {later[-1].name}; move the later checkpoints away, "
            "or start a new run with train.init_from"
        )
    return path


def write_run_files(run_dir: Path, config: Any, accelerator: Accelerator) -> None:
    """Make the folder and write config.yaml and environment.json, which gains an entry at every start."""
    run_dir.mkdir(parents=True, exist_ok=True)
    for folder in (run_dir, run_dir / "checkpoints", run_dir / "samples", run_dir / "snapshots"):
        files.clean_temporaries(folder)
    files.write_text(run_dir / "config.yaml", loading.dump(config))
    path = run_dir / "environment.json"
    with error_context(f"{path}: is damaged; move it away"):
        starts = files.read_json(path, list) if path.is_file() else []
    files.write_text(path, json.dumps([*starts, environment(accelerator)], indent=1))


def set_aside(run_dir: Path, step: int) -> list[Path]:
    """Move checkpoints, snapshots with their time grids, and previews past a step to a new folder RUN/set_aside; returns where
    they are now.

    A run that was resumed from before them has them: the checkpoints are damaged, the others are of an abandoned training.
    """
    moved = []
    destination = files.free_folder(run_dir / "set_aside")
    for folder in (run_dir / "checkpoints", run_dir / "snapshots", run_dir / "samples"):
        for path in sorted(folder.glob("step_*")):
            if (parsed := step_names.parse(path)) and parsed[0] > step:
                target = destination / folder.name / path.name
                target.parent.mkdir(parents=True, exist_ok=True)
                path.rename(target)
                moved.append(target)
    return moved


def environment(accelerator: Accelerator) -> dict:
    """What a result depends on besides the configuration: versions, machine, processes, code, command."""
    packages = ["torch", "torchvision", "accelerate", "omegaconf", "torch-fidelity", "numpy", "safetensors"]
    device = accelerator.device
    return {
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "command": shlex.join(sys.argv),
        "commit": _git_commit(),
        "python": platform.python_version(),
        "packages": {name: metadata.version(name) for name in packages},
        "platform": platform.platform(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "processes": accelerator.num_processes,
        "processes_per_machine": int(os.environ.get("LOCAL_WORLD_SIZE", accelerator.num_processes)),
        "sharded": accelerator.is_fsdp2,
        "threads": torch.get_num_threads(),
        "mixed_precision": accelerator.mixed_precision,
        "cuda": torch.version.cuda if device.type == "cuda" else None,
    }


def resume_command(run_dir: Path, script: str = "train.py", config: Any = None, launcher: str | None = None) -> str:
    """The command that resumes a run; it repeats the values that config.yaml stores as they were typed.

    launcher: what starts the script, where this process is none of the run.
    """
    arguments = [*script.split(), "-e", str(run_dir), "-r", "latest", *stored.typed_overrides(config)]
    return commands.command(*arguments, launcher=launcher) if launcher else commands.relaunched(*arguments)


def _resumed_folder(config: str | None, exp_dir: Path | None, resume: str) -> Path:
    if resume == "latest":
        return exp_dir or _default_folder(config)
    path = Path(resume)
    if not path.is_dir():
        raise UserError(f"-r {resume}: there is no such folder; give `latest`, a run folder or a checkpoint folder")
    run_dir = path
    if checkpoint.is_checkpoint(path):  # RUN/checkpoints/NAME, or NAME in that folder
        run_dir = path.parent.parent if len(path.parts) > 1 else Path("..")
    if exp_dir and exp_dir.resolve() != run_dir.resolve():
        raise UserError(f"-e {exp_dir}: the checkpoint {resume} belongs to {run_dir}; drop -e, or use train.init_from")
    return run_dir


def _default_folder(config: str | None) -> Path:
    if not config:
        raise UserError(NEEDS_CONFIG)
    return Path("runs") / Path(config).stem


def _git_commit() -> str | None:
    git = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        return subprocess.run(git, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None
