"""Command lines that a user would type: what scripts run, print, and suggest as the next step."""

import json
import os
import re
import shlex
import shutil
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from configs.schema import DataConfig
from flow.runtime import files

YAML_WORDS = ("null", "true", "false", "yes", "no", "on", "off", "y", "n")  # that are not strings where they stand alone
REPOSITORY = Path(__file__).parents[2]


def command(*arguments: str | Path, launcher: str | None = None) -> str:
    """`python ARGUMENTS...` as a line that works in this folder and this shell: quoted, with the interpreter and the script
    where they are found from here."""
    words = resolved(*arguments)
    settings = "".join(f"{name}={shlex.quote(value)} " for name, value in variables(words).items())
    return f"{settings}{launcher or interpreter()} {shlex.join(words)}"


def resolved(*arguments: str | Path) -> list[str]:
    """The arguments of `python` as words, a script of this project as a path from this folder."""
    script, *rest = map(str, arguments)
    ours = REPOSITORY / script
    if script.endswith(".py") and ours.is_file() and not (Path(script).is_file() and ours.samefile(script)):
        script = str(ours)
    return [script, *rest]


def variables(words: Sequence[str]) -> dict[str, str]:
    """The environment variables without which `python WORDS...` fails in this folder: those of `-m scripts.NAME`, which Python
    finds by itself in the root of the repository alone."""
    package = Path("scripts")
    in_root = package.is_dir() and package.samefile(REPOSITORY / package)
    if in_root or words[0] != "-m" or not words[1].startswith("scripts."):
        return {}
    others = filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))
    return {"PYTHONPATH": os.pathsep.join(dict.fromkeys([str(REPOSITORY), *others]))}


def interpreter(name: str = "python") -> str:
    """`name` where the shell finds this environment's program under it, else its path."""
    here = Path(sys.executable).with_name(name) if name != "python" else Path(sys.executable)
    on_path = shutil.which(name)
    if on_path and _same_program(Path(on_path), here):
        return name
    return shlex.quote(os.path.relpath(here) if here.is_relative_to(Path.cwd()) else str(here))


def _same_program(one: Path, other: Path) -> bool:
    """Whether both are one file in one folder: the interpreters of virtual environments are links to the same file, and a
    folder may hold several."""
    return one.resolve() == other.resolve() and one.parent.resolve() == other.parent.resolve()


def torchrun(processes: int | str) -> str:
    """The launcher of so many processes on this machine."""
    return f"{interpreter('torchrun')} --standalone --nproc_per_node {processes}"


def relaunched(*arguments: str | Path) -> str:
    """The command that starts a script with as many processes as this one was. Of several machines or sharded weights only the
    launcher's own command knows all."""
    processes = os.environ.get("WORLD_SIZE")
    if processes is None:
        return command(*arguments)
    sharded = os.environ.get("ACCELERATE_USE_FSDP", "").lower() == "true"
    if sharded or os.environ.get("LOCAL_WORLD_SIZE", processes) != processes:
        return f"the launcher of this command and {shlex.join(resolved(*arguments))}"
    return command(*arguments, launcher=torchrun(processes))


def shipped(name: str) -> Path:
    """The path of a file in configs/ from here."""
    path = Path("configs") / name
    return path if path.is_file() else REPOSITORY / path


def train_photos_command(name: str, height: int, width: int, *overrides: str) -> str:
    """A command that trains the U-Net of photos64.yaml in a new folder runs/NAME, with patches and attention that fit images of
    this size, for `summary`."""
    run_dir = files.free_folder(Path("runs") / name)
    return command("train.py", "-c", shipped("photos64.yaml"), "-e", run_dir, *overrides, *_fitting(height, width))


def _fitting(height: int, width: int) -> Iterator[str]:
    """What makes the U-Net of photos64.yaml, of three levels, fit images of another size."""
    if height % 8 or width % 8:
        yield "model.args.patch=1"
    if height % 4 or width % 4:
        yield "model.args.channel_mult=[1]"
        yield "model.args.attention_resolutions=[]"
    elif height != 64 or width % 8:
        yield f"model.args.attention_resolutions=[{height // (4 if height % 8 or width % 8 else 8)}]"


def override(key: str, value: Any) -> str:
    """`key=value`, the value as YAML on one line."""
    return f"{key}={_yaml(value)}"


def _yaml(value: Any) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key}: {_yaml(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(_yaml, value)) + "]"
    if isinstance(value, str) and re.fullmatch(r"[A-Za-z_/][\w./-]*", value) and value.lower() not in YAML_WORDS:
        return value
    return json.dumps(value, ensure_ascii=False)  # which is YAML too


def data_overrides(data: DataConfig) -> list[str]:
    """The overrides that name a data set."""
    values = {"data.name": data.name, "data.root": data.root, "data.args": data.args}
    return [override(key, value) for key, value in values.items() if value]


def train_arguments(config: str, run_dir: Path, overrides: list[str]) -> list[str]:
    """The command that starts the run, or resumes it where it was started."""
    started = (run_dir / "config.yaml").is_file()
    return ["train.py", "-c", config, "-e", str(run_dir), *(["-r", "latest"] if started else []), *overrides]


def evaluate_arguments(weights: str | Path, out: Path, overrides: Sequence[str] = (), **flags: Any) -> list[str]:
    """The command that adds rows to the table in `out`. flags: by their names, one value or several; None leaves a flag out,
    True is one without a value."""
    words: list[str] = []
    for name, value in flags.items():
        if value is not None:
            values = [] if value is True else value if isinstance(value, list | tuple) else [value]
            words += [f"--{name}", *map(str, values)]
    return ["evaluate.py", "--weights", str(weights), *words, "--out", str(out), *overrides]


def sample_command(weights: str | Path, name: str, *flags: str) -> str:
    """A command that samples from the weights into a new folder samples/NAME, for `summary`."""
    save_dir = files.free_folder(Path("samples") / name)
    return command("sample.py", "--weights", weights, "--n_samples", "64", "--save_dir", save_dir, *flags)


def condition_flags(guidance_scale: float = 1.0, prompts: Sequence[str] | None = None) -> list[str]:
    """The flags of a guidance scale and prompts, for a suggested command."""
    flags = ["--guidance_scale", f"{guidance_scale:.15g}"] if guidance_scale != 1 else []
    return [*flags, "--prompts", *prompts] if prompts else flags


def option_flag(name: str) -> str:
    """The flag of an option of a solver."""
    return "--sde_noise_scale" if name == "noise_scale" else f"--{name}"


def option_flags(options: Iterable[tuple[str, float | str]]) -> list[str]:
    """The flags of a solver's options, for a suggested command."""
    return [word for name, value in options for word in (option_flag(name), f"{value}")]
