"""Images in Parquet files as the Hugging Face hub stores them: what `scripts/pack_images.py` reads, file by file.

A column holds encoded images, as structs {bytes, path} or as plain bytes; another one may hold labels. Where the package
`datasets` wrote a file, the metadata of its schema name the kinds of columns and the classes; otherwise the columns are found
by type and name, or named by the user.
"""

import bisect
import fnmatch
import io
import json
import re
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import accumulate
from pathlib import Path, PurePosixPath
from typing import Any

import torch

from datasets.encoded import EncodedImages, check_format

NO_LABELS = "none"  # as the name of a column
LABEL_NAMES = ("label", "labels", "class", "fine_label")  # looked for in this order
ROW_GROUPS = 2  # kept in memory: readers of consecutive images may be on both sides of a border


class Parquet(EncodedImages):
    """The images of Parquet files of one schema, in order. Fast for images in sequence: a whole row group is read at once."""

    def __init__(
        self, path: Path, files: Sequence[str], size: int | None = None, channels: int = 3, image_column: str | None = None,
        label_column: str | None = None,
    ):  # fmt: skip
        """
        Args:
            files: relative to `path`.
            image_column: None to find it.
            label_column: NO_LABELS for none, None to find it.

        Raises:
            ValueError: for a file that is damaged or has no such columns, and for labels that are none.
        """
        check_format(size, channels)
        super().__init__(path, [path / name for name in files], size, channels)
        self.notes = []
        schema = None
        groups = []
        columns = []
        for name, file in zip(files, self.files, strict=True):
            with _opened(file) as opened:
                schema = schema or opened.schema_arrow
                if not columns:
                    image, label = find_columns(schema, image_column, label_column)
                    columns = [image, *([label] if label else [])]
                if lacking := [column for column in columns if column not in opened.schema_arrow.names]:
                    raise ValueError(f"{file}: has no column {lacking[0]!r}, which {files[0]} has")
                rows = [opened.metadata.row_group(i).num_rows for i in range(opened.metadata.num_row_groups)]
            groups += [(name, i, n) for i, n in enumerate(rows)]
        self.image_column, self.label_column = image, label
        self._groups = groups  # (file, row group, rows)
        self._ends = list(accumulate(n for _, _, n in groups))
        if not len(self):
            raise ValueError(f"{path}: its Parquet files hold no rows")
        self._read: dict[int, Any] = {}  # row groups, the last ones
        self._lock = threading.Lock()
        self.labels, self.class_names = self._labels(schema) if label else (None, ())
        self._measure()

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def name_of(self, index: int) -> str:
        name, _, row = self._place(index)
        inside = self._cell(index)
        path = inside.get("path") if isinstance(inside, dict) else None
        return f"{name}, row {row}" + (f" ({path})" if path else "")

    def encoded(self, index: int) -> io.BytesIO:
        cell = self._cell(index)
        return io.BytesIO((cell.get("bytes") if isinstance(cell, dict) else cell) or b"")  # an empty file is not readable

    def _place(self, index: int) -> tuple[str, int, int]:
        """File, row group in all files, and row in the file."""
        group = bisect.bisect_right(self._ends, index)
        name, number, rows = self._groups[group]
        before = sum(n for _, _, n in self._groups[group - number : group])
        return name, group, before + index - (self._ends[group] - rows)

    def _cell(self, index: int) -> Any:
        name, group, _ = self._place(index)
        with self._lock:
            if group not in self._read:
                with _opened(self.path / name) as file:
                    table = file.read_row_group(self._groups[group][1], columns=[self.image_column])
                self._read = dict(list(self._read.items())[1 - ROW_GROUPS :]) | {group: table.column(0)}
            column = self._read[group]
        return column[index - (self._ends[group] - len(column))].as_py()

    def _labels(self, schema: Any) -> tuple[torch.Tensor | None, tuple[str, ...]]:
        values: list[Any] = []
        for file in self.files:
            with _opened(file) as opened:
                values += opened.read(columns=[self.label_column]).column(0).to_pylist()
        names = _features(schema).get(self.label_column, {}).get("names")
        if names is not None and set(values) == {-1}:  # how the hub marks a test split without labels
            return None, ()
        known = range(len(names)) if names is not None else sorted({v for v in values if isinstance(v, str | int)}, key=_order)
        position = {value: i for i, value in enumerate(known)}
        for k, value in enumerate(values):
            if value not in position:
                raise ValueError(
                    f"{self.label_column}: row {k} holds {value!r}, no class; --label_column {NO_LABELS} packs no labels"
                )
        return torch.tensor([position[value] for value in values]), tuple(map(str, names if names is not None else known))


def find_columns(schema: Any, image_column: str | None, label_column: str | None) -> tuple[str, str | None]:
    """The columns of images and of labels (None: none) of an Arrow schema.

    Raises ValueError for a column that is not there or of another type, and where there is not one alone to choose.
    """
    features = _features(schema)
    tagged = [f.name for f in schema if features.get(f.name, {}).get("_type") == "Image"]
    images = tagged or [f.name for f in schema if _holds_images(f.type)]
    if image_column is not None and image_column not in tagged:
        able = [f.name for f in schema if f.name in tagged or _holds_images(f.type)]
        if image_column not in able:
            raise ValueError(f"--image_column {image_column}: no column of images; those are {', '.join(able) or 'none'}")
    if image_column is None and len(images) != 1:
        columns = (
            f"{len(images)} columns ({', '.join(images)})" if images else f"no column of images ({', '.join(schema.names)})"
        )
        raise ValueError(f"holds {columns}; choose with --image_column")
    image = image_column or images[0]
    labels = [f.name for f in schema if features.get(f.name, {}).get("_type") == "ClassLabel"]
    labels = labels or [f.name for f in schema if f.name.lower() in LABEL_NAMES and _is_label(f.type)]
    if label_column is None:
        named = [name for word in LABEL_NAMES for name in labels if name.lower() == word]
        if len(labels) > 1 and not named:
            raise ValueError(f"holds {len(labels)} columns of labels ({', '.join(labels)}); choose with --label_column")
        return image, next(iter(named or labels), None)
    if label_column == NO_LABELS:
        return image, None
    if label_column not in schema.names or not _is_label(schema.field(label_column).type):
        able = ", ".join(f.name for f in schema if _is_label(f.type))
        raise ValueError(f"--label_column {label_column}: no column of whole numbers or strings; those are {able or 'none'}")
    return image, label_column


def select_files(names: Sequence[str], split: str | None, pattern: str | None) -> tuple[str, list[str]]:
    """The split and its Parquet files, of names such as data/train-00000-of-00005.parquet, default/train/0000.parquet.

    Args:
        names: paths with forward slashes, in any order.
        split: None for "train", or where there is no such split the only one.
        pattern: of the paths, as in `configuration/*`; None for all.

    Raises:
        ValueError: where no file is left, or those of several data sets.
    """
    parquet = [name for name in names if name.endswith(".parquet")]
    if not parquet:
        raise ValueError("holds no Parquet files")
    matching = sorted(name for name in parquet if pattern is None or fnmatch.fnmatchcase(name, pattern))
    if not matching:
        raise ValueError(f"--files {pattern}: matches no Parquet file; there are {', '.join(sorted(parquet)[:3])}, ...")
    sets: dict[str, dict[str, list[str]]] = {}
    for name in matching:
        folder, part = _split_of(name)
        sets.setdefault(part, {}).setdefault(folder, []).append(name)
    selected = split or ("train" if "train" in sets else next(iter(sets)) if len(sets) == 1 else None)
    if selected not in sets:
        flag = f"--split {split}:" if split else "--split is missing:"
        raise ValueError(f"{flag} choose from {', '.join(sorted(sets))}")
    if len(sets[selected]) > 1:
        raise ValueError(
            f"holds several data sets ({', '.join(sets[selected])}); choose with --files '{next(iter(sets[selected]))}/*'"
        )
    return selected, next(iter(sets[selected].values()))


def _split_of(name: str) -> tuple[str, str]:
    """(folder, split) of a file: train-00000-of-00005 is of train, train/0000 too."""
    path = PurePosixPath(name)
    stem = re.sub(r"(^|[-_.])\d+([-_.]of[-_.]\d+)?([-_.][0-9a-f]{8,})?$", "", path.stem)
    return (str(path.parent), stem) if stem or path.parent.name == "" else (str(path.parent.parent), path.parent.name)


@contextmanager
def _opened(file: Path) -> Iterator[Any]:
    """A pyarrow.parquet.ParquetFile. Raises ValueError that names a damaged file, whose pages may be read in the block."""
    import pyarrow.parquet  # only packing needs it

    try:
        with pyarrow.parquet.ParquetFile(file) as opened:
            yield opened
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(f"{file}: not a whole Parquet file ({str(error).splitlines()[0]})") from None


def _features(schema: Any) -> dict[str, Any]:
    """{column: {"_type": "Image" | "ClassLabel" | ..., "names": [...]}}, from the metadata that `datasets` writes."""
    try:
        features = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))["info"]["features"]
        return {name: feature for name, feature in features.items() if isinstance(feature, dict)}
    except (ValueError, KeyError, TypeError, AttributeError):
        return {}


def _holds_images(kind: Any) -> bool:
    import pyarrow.types as types

    if types.is_struct(kind):
        return kind.get_field_index("bytes") >= 0
    return types.is_binary(kind) or types.is_large_binary(kind)


def _is_label(kind: Any) -> bool:
    import pyarrow.types as types

    if types.is_dictionary(kind):  # a category of pandas
        kind = kind.value_type
    return types.is_integer(kind) or types.is_string(kind) or types.is_large_string(kind)


def _order(value: Any) -> tuple[bool, Any]:
    return isinstance(value, str), value
