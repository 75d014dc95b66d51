"""Files that are whole or absent: written under a temporary name, synced, renamed."""

import fcntl
import hashlib
import json
import os
import re
import secrets
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TextIO

from safetensors import SafetensorError

TEMPORARY = ".tmp-"  # prefix of what is not finished
LOCK = ".lock"  # in a folder that is being written, see lock.py
NAMES = "surrogateescape"  # how bytes that are not UTF-8 are written: names of files, which a line may hold, are any bytes
MOST_FOLDERS = 10_000  # of one name with a number behind it


@contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """A temporary file to write to, empty at first; it becomes `path` when the block ends well, and is removed when it does
    not. Its mode is that of every new file here, whatever the writer makes of it: safetensors lets the owner alone read."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = temporary_path(path)
    try:
        with naming(path):
            temporary.touch()
            mode = temporary.stat().st_mode
            yield temporary
            temporary.chmod(mode)
            fsync(temporary)
            os.replace(temporary, path)
            fsync(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def temporary_path(path: Path) -> Path:
    """The path beside this one to write to first; another one for every writer, also on machines that share the folder."""
    return path.with_name(f"{TEMPORARY}{secrets.token_hex(4)}-{path.name}")


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Errors of writing `path` become OSErrors that name it: those of a full disk name no file, and those of safetensors are
    of another kind. An error that names another file stays as it is."""
    try:
        yield
    except OSError as error:
        if error.filename and not Path(str(error.filename)).name.startswith(TEMPORARY):
            raise
        if error.errno:
            raise OSError(error.errno, error.strerror, str(path)) from error
        raise OSError(f"{path}: {error}") from error
    except SafetensorError as error:
        raise OSError(f"{path}: {error}") from error


def append_line(path: Path, line: str, sync: bool = False) -> None:
    """Add a whole line to a text file, or nothing: a write that fails, as on a full disk, is undone.

    Starts a new line where the last one has no newline. sync: wait until it is on the disk. Processes that add to one file
    wait for each other. Raises OSError that names the file.
    """
    data = line.encode(errors=NAMES) + b"\n"
    with naming(path), open(path, "a+b", buffering=0) as file:  # unbuffered: closing a buffer would retry what failed
        with suppress(OSError):  # file systems without locks
            fcntl.flock(file, fcntl.LOCK_EX)
        size = file.seek(0, os.SEEK_END)
        if size:
            file.seek(size - 1)
            data = data if file.read(1) == b"\n" else b"\n" + data
        try:
            while data:
                data = data[file.write(data) :]
            if sync:
                os.fsync(file.fileno())
        except BaseException:
            with suppress(OSError):
                file.truncate(size)
            raise


@contextmanager
def csv_file(path: Path) -> Iterator[TextIO]:
    """A text file for `csv`, whole or absent."""
    with atomic_file(path) as temporary, open(temporary, "w", newline="", encoding="utf-8", errors=NAMES) as file:
        yield file


def write_text(path: Path, text: str) -> None:
    """Write a whole text file or none."""
    with atomic_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8", errors=NAMES)


def write_bytes(path: Path, content: bytes) -> None:
    """Write a whole file or none."""
    with atomic_file(path) as temporary:
        temporary.write_bytes(content)


def link(source: Path, path: Path) -> None:
    """Give a file a second name, in place of what has it; a copy where the file system has no hard links."""
    with atomic_file(path) as temporary:
        temporary.unlink()
        try:
            os.link(source, temporary)
        except OSError:
            shutil.copyfile(source, temporary)


def atomic_rename_dir(temporary: Path, path: Path) -> None:
    """Sync a finished temporary folder and give it its name; an empty folder of this name is replaced. Files in it get the mode
    of every new file, as in `atomic_file`."""
    _finish_tree(temporary)
    if is_empty_dir(path):  # but for leftovers
        shutil.rmtree(path)
    os.replace(temporary, path)
    fsync(path.parent)


def replace_dir(temporary: Path, path: Path) -> None:
    """As `atomic_rename_dir`, in place of a folder of this name, which is there until the new one is synced."""
    _finish_tree(temporary)
    before = path.with_name(f"{TEMPORARY}{path.name}.before")
    shutil.rmtree(before, ignore_errors=True)
    if path.exists():
        path.rename(before)
    os.replace(temporary, path)
    fsync(path.parent)
    shutil.rmtree(before, ignore_errors=True)


def _finish_tree(folder: Path) -> None:
    """Set the modes of all files, and wait until all is on the disk."""
    inside = list(folder.rglob("*"))
    probe = temporary_path(folder / "mode")
    probe.touch()
    mode = probe.stat().st_mode
    probe.unlink()
    for path in inside:
        if path.is_file():
            path.chmod(mode)
    for path in [*inside, folder]:
        fsync(path)


def is_temporary(name: str) -> bool:
    """Whether an unfinished file or folder has this name: ours, or that under which safetensors 0.8 writes at first."""
    return name.startswith(TEMPORARY) or re.fullmatch(r"\.tmp[A-Za-z0-9]{6}", name) is not None


def clean_temporaries(folder: Path) -> None:
    """Delete what interrupted writers left behind."""
    for path in [p for p in folder.glob(".tmp*") if is_temporary(p.name)]:
        shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)


def is_empty_dir(folder: Path) -> bool:
    """Whether a folder is empty but for its lock and what an interrupted writer left behind; False for a file."""
    return folder.is_dir() and all(p.name == LOCK or is_temporary(p.name) for p in folder.iterdir())


def read_json(path: Path, kind: type = dict) -> Any:
    """The object, or the list, in a JSON file. Raises ValueError where it is damaged, OSError where it cannot be read."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    if not isinstance(value, kind):
        raise ValueError(f"it holds no {'list' if kind is list else 'object'}")
    return value


def resolve_unnamed(path: Path) -> Path:
    """The path; where it ends without a name, as `.` and `..` do, the absolute one, which others can be named after."""
    return path.resolve() if path.name in ("", "..") else path


def free_folder(path: Path, may_hold: Callable[[Path], bool] = lambda folder: False) -> Path:
    """The path, or with a number behind it the first one that is not there yet or empty: for a command that is suggested.

    A folder that cannot be looked into is not free; the path itself where none is. may_hold: whether a folder that is not
    empty will do as well.
    """
    candidates = (path if k == 1 else path.with_name(f"{path.name}_{k}") for k in range(1, MOST_FOLDERS))
    return next((folder for folder in candidates if _is_free(folder) or may_hold(folder)), path)


def _is_free(folder: Path) -> bool:
    try:
        return not folder.exists() or is_empty_dir(folder)
    except OSError:
        return False


def fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
