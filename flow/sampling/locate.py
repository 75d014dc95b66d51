"""Where the snapshots of a flow lie: run folders, checkpoints, exported folders, files, the Hugging Face hub."""

from collections.abc import Sequence
from pathlib import Path

from configs.errors import UserError
from flow.runtime import distributed, step_names
from flow.sampling import hub

RUN_FOLDERS = {"snapshots": 0, "checkpoints": 1, "power_averages": 1, "posthoc_ema": 0}  # folders of a run, and their depth
EMA_FILE = "ema.safetensors"  # the first half-life; others are ema_<half-life>.safetensors, all of them snapshots
BEST_FILE = "best.safetensors"  # in a run folder: the snapshot with the best value of evaluate.keep_best


def find(weights: str | Path) -> Path:
    """The snapshot file that a run folder (its latest), a checkpoint folder, an exported folder, a file or a reference to the
    Hugging Face hub stands for. All processes call it, and get the same one."""
    if hub.is_reference(weights):
        return hub.download(weights)
    path = Path(weights)
    if not path.exists():  # on this machine: the others would wait for it
        raise UserError(f"--weights {path}: there is no such file or folder")
    return path if path.is_file() else distributed.decided_by_main(lambda: _in_folder(path))


def _in_folder(path: Path) -> Path:
    snapshots = step_names.by_step(path / "snapshots", ".safetensors") or step_names.by_step(path, ".safetensors")
    if snapshots:
        return snapshots[max(snapshots)]
    for name in (EMA_FILE, hub.WEIGHTS_FILE):
        if (path / name).is_file():
            return path / name
    raise UserError(f"--weights {path}: holds no snapshot; give a run folder, a checkpoint folder or a .safetensors file")


def snapshots_of_run(path: Path, steps: Sequence[str]) -> list[Path]:
    """The snapshots of a run with these steps or with "all", oldest first.

    `path` is the run folder, which means the first half-life, or a snapshot in it, which means its half-life. Raises UserError
    where there are no snapshots, and for a step that has none.
    """
    named = step_names.parse(path) if path.is_file() else None
    is_snapshot = named is not None and named[1].endswith(".safetensors")
    folder, tail = (path.parent, named[1]) if named and is_snapshot else (path / "snapshots", ".safetensors")
    by_number = step_names.by_step(folder, tail)
    if not by_number:
        raise UserError(f"--snapshots: --weights {path} is neither a run folder with snapshots nor one of its snapshots")
    for word in steps:
        if word != "all" and (not word.isdecimal() or int(word) not in by_number):
            raise UserError(f"--snapshots {word}: must be all, or steps among {', '.join(map(str, by_number))}")
    if "all" in steps:
        return list(by_number.values())
    return [p for step, p in by_number.items() if step in map(int, steps)]


def name_of(weights: str | Path) -> str:
    """What tables call weights: their run, with the half-life of averages after the first, else the repository, folder or
    file."""
    if hub.is_reference(weights):
        return hub.name_of(weights)
    path = Path(weights)
    run = path.resolve().parent
    if path.is_file() and run.name == "snapshots" and (run.parent / "config.yaml").is_file():
        return run.parent.name + path.stem.removeprefix(path.stem.partition(".")[0])
    return path.resolve().name if path.is_dir() else path.stem


def names_of(folders: list[Path]) -> list[str]:
    """The names of runs beside each other: those of their folders, as far as these are different."""
    names = [folder.resolve().name for folder in folders]
    return [name if names.count(name) == 1 else str(folder) for name, folder in zip(names, folders, strict=True)]


def pinned(weights: str, file: Path) -> str:
    """What names this very snapshot to another command, where `weights` named it here: the latest one of a run may change."""
    return weights if hub.is_reference(weights) else str(file)


def run_of(file: Path) -> Path | None:
    """The run folder in which a file lies where a run keeps its snapshots and checkpoints; such a file counts as the user's
    own. None for others."""
    parents = file.resolve().parents
    inside = [(name, parents[depth]) for name, depth in RUN_FOLDERS.items() if depth < len(parents)]
    runs = [folder.parent for name, folder in inside if folder.name == name]
    if file.name == BEST_FILE:
        runs.append(parents[0])
    return next((run for run in runs if (run / "config.yaml").is_file()), None)


def results_folder(weights: str | Path) -> Path:
    """Where results of these weights belong: the run folder that they are or lie in, another folder that they are, the folder
    of a file; for those of the hub, a folder with the name of the repository."""
    if hub.is_reference(weights):
        return Path(hub.name_of(weights))
    path = Path(weights)
    if (path / "config.yaml").is_file():
        return path
    run = run_of(find(path))
    if run is not None:
        return next((folder for folder in (path, *path.parents) if folder.resolve() == run), run)  # as it was typed
    return path if path.is_dir() else path.parent
