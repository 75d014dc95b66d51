"""Sources that are data sets: those of a configuration and of --source."""

from dataclasses import dataclass
from functools import partial
from pathlib import PurePath
from typing import Any

from accelerate import Accelerator
from torch import Tensor

from datasets import DataSet, DataSpec, reading
from datasets.folder import IMAGE_SUFFIXES, Folder
from datasets.images import to_float
from datasets.packed import Packed
from flow.model import FlowModel
from flow.runtime import distributed
from flow.runtime.errors import error_context
from flow.sampling import named_data
from flow.source import GAUSSIAN, DataSource, GaussianSource, OrderedSource, Source


@dataclass
class DataSamples:
    """Implements `flow.source.Samples` for a data set of images or points."""

    data: DataSet
    key: str = "flow.source"  # what error messages call it

    def __len__(self) -> int:
        return len(self.data)

    def read(self, indices: list[int]) -> Tensor:
        """[n, ...], float32: images in [-1, 1] or points."""
        with error_context(self.key):
            return to_float(reading.read(self.data, indices))

    def fingerprint(self) -> str:
        return self.data.fingerprint()

    def mismatch(self, data: DataSet) -> str | None:
        """Why sample k is not that of image k: other names, but for the suffix of an image, of files or of what packing left
        out."""
        left_out = [set(map(_stem, each.skipped)) for each in (data, self.data) if isinstance(each, Packed)]
        if len(left_out) == 2 and (differing := sorted(left_out[0] ^ left_out[1])):
            return f"{differing[0]} was left out of one of the two packed sets; remove it from both sources"
        name_of, start_of = (getattr(each, "name_of", None) for each in (data, self.data))
        if name_of and start_of:
            for k in range(len(data)):
                image, start = _stem(name_of(k)), _stem(start_of(k))
                if image != start:
                    return f"image {k} is {image}, its start {start}; give both files the same name"
        return None


def build(name: str, root: str | None, args: dict[str, Any]) -> Source:
    """The source `name`: "gaussian", which takes no arguments, or a data set, whose held-out samples are the other split, new
    points of a toy, or the set itself where there is nothing else.

    Raises ValueError for arguments of gaussian; a data set is looked at when it is needed first.
    """
    if name == GAUSSIAN:
        if args:
            raise ValueError(f"args={args}: gaussian takes none")
        return GaussianSource()
    spec = DataSpec(name, root, args)
    return DataSource(name, partial(_read, spec), partial(_read_held_out, spec), args)


def attach(accelerator: Accelerator, model: FlowModel, text: str | None, root: str | None, n: int = 0) -> str | None:
    """Read what images of the model start from; returns a note where n images need more samples than there are, so that some
    are used twice.

    text: what --source names, in its order (see `named_data.spec_of`). None: the held-out samples of the training, or noise.

    Raises:
        UserError: for what is neither, for samples of another shape, and for a --source where the flow starts at noise.
    """
    if text is not None:
        named: str = text
        distributed.main_process_first(accelerator, lambda: replace_by(model, named, root))
    own = model.source
    if isinstance(own, DataSource):
        with error_context("flow.source"):
            source = distributed.main_process_first(accelerator, lambda: own.held_out)
    elif isinstance(own, OrderedSource):
        source = own
    else:
        return None
    with error_context("--source" if text else "flow.source"):
        source.draw("sample", 0, [0], model.shape)
    if text and isinstance(source.samples, DataSamples):
        for note in source.samples.data.notes:
            accelerator.print(f"note: {note}")
    count = len(source.samples)
    return f"{source.name} has {count:,} samples, so after the first {count:,} images they come again" if n > count else None


def number_of_starts(source: Source) -> int | None:
    """How many samples images of a flow from data start at, one after the other; None for noise. Reads them."""
    own = source.held_out if isinstance(source, DataSource) else source
    return len(own.samples) if isinstance(own, OrderedSource) else None


def names_of_starts(model: FlowModel, indices: range) -> list[str] | None:
    """The file that each of these images starts at, relative to its folder; None for noise and for sets without files. Call
    after `attach`."""
    own = model.source.held_out if isinstance(model.source, DataSource) else model.source
    if not isinstance(own, OrderedSource) or not isinstance(own.samples, DataSamples):
        return None
    data = own.samples.data
    return [data.name_of(k % len(data)) for k in indices] if isinstance(data, Folder) else None


def fingerprint(model: FlowModel) -> str | None:
    """The fingerprint of the samples that a flow from data starts at, once `attach` has read them; None for noise."""
    own = model.source.held_out if isinstance(model.source, DataSource) else model.source
    return own.samples.fingerprint() if isinstance(own, OrderedSource) else None


def training_fingerprint(source: Source) -> str | None:
    """The fingerprint of the samples that training and pairs draw from; None for noise."""
    return source.training.samples.fingerprint() if isinstance(source, DataSource) else None


def replace_by(model: FlowModel, text: str, root: str | None) -> None:
    """Give the model the samples of --source in place of its own. Raises UserError as `attach` does."""
    with error_context("--source"):
        if model.source.name == GAUSSIAN:
            raise ValueError(f"{text}: this flow starts at Gaussian noise; flow.source of its training makes it start at data")
        model.source = OrderedSource(_read(named_data.spec_of(text, root, model.shape), "--source"), text)


def _stem(name: str) -> str:
    """The name of an image without its suffix; of a row of a Parquet file its number."""
    path = PurePath(name)
    return str(path.with_suffix("")) if path.suffix.lower() in IMAGE_SUFFIXES else name.rpartition(", ")[2]


def _read(spec: DataSpec, key: str = "flow.source") -> DataSamples:
    """Raises ValueError for latents."""
    data = spec.build()
    if data.codec is not None:
        raise ValueError(f"{spec.name}: are latents; a source has pixels or points")
    return DataSamples(data, key)


def _read_held_out(spec: DataSpec) -> DataSamples:
    other = spec.held_out()
    return _read(other.spec if other else spec)
