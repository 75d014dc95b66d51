"""Image files below a folder, a subfolder for each class."""

import os
import shlex
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from datasets.encoded import EncodedImages, check_format
from datasets.places import resolve_path

NAMED = 5  # files or folders that are skipped, in a note
SPLITS = {"train", "training", "val", "valid", "validation", "dev", "eval", "test", "testing"}  # names of folders
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".gif")
PARQUET_SUFFIX = ".parquet"


class Folder(EncodedImages):
    """Image files below a folder.

    Subfolders are classes, in alphabetical order; without subfolders, or with images beside them, there are no labels. Links
    to folders count as folders. Files that are not images by their suffix and hidden ones (`.x`, the `._x.png` of macOS) are
    skipped, and so are subfolders without images.
    """

    def __init__(self, path: Path, size: int | None, channels: int):
        if path.is_file():
            remedy = _packing(path) if path.suffix == PARQUET_SUFFIX else "name a folder of images; unpack an archive first"
            raise FileNotFoundError(f"path={path}: is a file; {remedy}")
        if not path.is_dir():
            raise FileNotFoundError(f"path={path}: there is no such folder")
        check_format(size, channels)
        files, skipped = _scan(path)
        if not files:
            remedy = f"; {_packing(path)}" if any(name.endswith(PARQUET_SUFFIX) for name in skipped) else ""
            raise FileNotFoundError(f"path={path}: holds no image ({' '.join(IMAGE_SUFFIXES)}){remedy}")
        super().__init__(path, files, size, channels)
        self.notes = [f"path={path}: skipped {_listed(skipped)}, not images"] if skipped else []
        top = [p.relative_to(path).parts for p in files]
        beside = [parts[0] for parts in top if len(parts) == 1]
        if 0 < len(beside) < len(top):
            self.notes.append(f"path={path}: no classes, as {_listed(beside)} beside the subfolders; move what lies there")
        nested = all(len(parts) > 1 for parts in top)
        self.class_names = tuple(sorted({parts[0] for parts in top})) if nested else ()
        for name in self.class_names:
            if any("\ud800" <= letter <= "\udfff" for letter in name):  # a byte that is not UTF-8; snapshots hold text
                raise ValueError(f"path={path}: the name of the class folder {name!a} is not UTF-8; rename it")
        self.notes += _doubtful_classes(path, self.class_names)
        class_of = {name: i for i, name in enumerate(self.class_names)}
        self.labels = torch.tensor([class_of[parts[0]] for parts in top]) if nested else None
        self._measure()

    def __len__(self) -> int:
        return len(self.files)

    def name_of(self, index: int) -> str:
        return str(self.files[index].relative_to(self.path))

    def encoded(self, index: int) -> Path:
        return self.files[index]


def files_below(folder: Path, above: frozenset[tuple[int, int]] = frozenset()) -> Iterator[Path]:
    """What lies below a folder and is no folder itself, in no order: files, links that lead nowhere, folders that may not be
    read.

    Links to folders are followed, but for those to a folder that they lie in, one of `above` (device and inode).
    """
    try:
        status = folder.stat()
        identity = (status.st_dev, status.st_ino)
        entries = [] if identity in above else list(os.scandir(folder))
    except PermissionError:
        yield folder
        return
    for entry in entries:
        if entry.is_dir(follow_symlinks=False) or (entry.is_symlink() and os.path.isdir(entry.path)):
            yield from files_below(Path(entry.path), above | {identity})
        else:
            yield Path(entry.path)


def _scan(path: Path) -> tuple[list[Path], list[str]]:
    """The images below a folder, sorted, and the names of what else lies there, relative to it."""
    images, others = [], []
    for file in sorted(files_below(path)):
        relative = file.relative_to(path)
        hidden = any(part.startswith(".") for part in relative.parts)
        if file.suffix.lower() in IMAGE_SUFFIXES and not hidden and file.is_file():
            images.append(file)
        else:
            others.append(str(relative))
    return images, others


def _packing(path: Path) -> str:
    """What to do with images in Parquet files, in a line."""
    return (
        f"pack Parquet files with `python -m scripts.pack_images --source {shlex.quote(str(path))} --save_dir DIR`, and train "
        "with data.name=packed data.args.path=DIR"
    )


def _doubtful_classes(path: Path, names: Sequence[str]) -> list[str]:
    """Notes on classes that are hardly meant as such: splits of a data set, and subfolders without images."""
    if not names:
        return []
    notes = []
    if all(name.lower() in SPLITS for name in names):
        split = next((name for name in names if name.lower().startswith("train")), names[0])
        notes.append(
            f"path={path}: its classes ({', '.join(names)}) have the names of splits; to read one split, name its folder: "
            f"path={path / split}"
        )
    folders = {entry.name for entry in path.iterdir() if entry.is_dir() and not entry.name.startswith(".")}
    if empty := sorted(folders - set(names)):
        notes.append(f"path={path}: skipped {_listed(empty, 'folder')}, without images; add images, or remove what is no class")
    return notes


def _listed(names: list[str], kind: str = "file") -> str:
    """'3 files (a, b, c)', or the first few of more."""
    more = ", ..." if len(names) > NAMED else ""
    return f"{len(names)} {kind}{'s' * (len(names) > 1)} ({', '.join(names[:NAMED])}{more})"


def folder(root: Path, path: str, size: int | None = None, channels: int = 3) -> Folder:
    """Image files below `path` (as it is, or below `root`)."""
    return Folder(resolve_path(root, path), size, channels)
