"""Names of files and folders of a training step: step_00001000, step_00001000.png, step_00001000.ema_500.safetensors."""

import re
from pathlib import Path

_NAME = re.compile(r"step_(\d{8,})(\..*)?")


def name_of(step: int, tail: str = "") -> str:
    """The name with this tail, such as .png; without a tail, the name of a folder."""
    return f"step_{step:08d}{tail}"


def parse(path: Path) -> tuple[int, str] | None:
    """(step, tail) of a path with such a name; None for another one."""
    match = _NAME.fullmatch(path.name)
    return (int(match[1]), match[2] or "") if match else None


def step_of(path: Path) -> int:
    """The step of a path with such a name. Raises ValueError for another one."""
    parsed = parse(path)
    if parsed is None:
        raise ValueError(f"{path}: is not named after a step")
    return parsed[0]


def by_step(folder: Path, tail: str = "") -> dict[int, Path]:
    """{step: path} of the files or folders in `folder` named after a step, with exactly this tail; oldest first."""
    named = ((parse(path), path) for path in folder.glob("step_*"))
    return dict(sorted((name[0], path) for name, path in named if name and name[1] == tail))
