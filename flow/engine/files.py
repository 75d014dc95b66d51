"""Files that are whole or absent: written under a temporary name, synced, renamed."""

import hashlib
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path

TEMPORARY = ".tmp-"  # prefix of what is not finished


@contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """A temporary path to write to; it becomes `path` when the block ends well, and is removed when it does not."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{TEMPORARY}{os.getpid()}-{path.name}")
    try:
        yield temporary
        sync(temporary)
        os.replace(temporary, path)
        sync(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write a whole text file or none."""
    with atomic_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_bytes(path: Path, content: bytes) -> None:
    """Write a whole file or none."""
    with atomic_file(path) as temporary:
        temporary.write_bytes(content)


def commit_folder(temporary: Path, path: Path) -> None:
    """Sync a finished temporary folder and give it its name."""
    for file in temporary.rglob("*"):
        sync(file)
    sync(temporary)
    os.replace(temporary, path)
    sync(path.parent)


def remove_unfinished(folder: Path) -> None:
    """Delete what interrupted writers left behind."""
    for path in folder.glob(f"{TEMPORARY}*"):
        shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)


def holds_nothing(folder: Path) -> bool:
    """Whether a folder is empty but for what an interrupted writer left behind; False for a file."""
    return folder.is_dir() and all(path.name.startswith(TEMPORARY) for path in folder.iterdir())


def free_folder(path: Path) -> Path:
    """The path, or with a number behind it the first one that is not there yet or empty: for a command that is suggested."""
    candidates = (path if k == 1 else path.with_name(f"{path.name}_{k}") for k in count(1))
    return next(p for p in candidates if not p.exists() or holds_nothing(p))


def sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
