"""What a flag names that takes real images or the starts of a flow: a data set, or a folder of images."""

from pathlib import Path

from datasets import SHAPES, DataSpec
from datasets.packed import is_packed
from datasets.places import default_root, resolve_path
from flow.sampling.space import Space

RECORD = "sampling.json"  # beside the folder of images that sample.py writes
IMAGES = "images"  # that folder


def spec_of(text: str, root: str | Path | None, image_shape: tuple[int, ...]) -> DataSpec:
    """The data that `text` names: a data set (NAME, NAME:train, NAME:test, toys:SHAPE), or a folder, as it is or below `root`,
    of packed images, of sample.py, whose grid is left out, or of any images, which become images of this shape.

    Raises ValueError for something else.
    """
    if named := DataSpec.parse(text, root):
        return named
    if Space(image_shape).is_points:
        raise ValueError(f"{text}: must be toys:SHAPE, as these are points")
    folder = resolve_path(Path(root) if root else default_root(), text)
    if is_packed(folder):
        return DataSpec("packed", root, {"path": text})
    if not folder.is_dir():
        names = ", ".join(name for name in SHAPES if name != "toys")
        if folder.is_file():
            raise ValueError(f"{text}: is a file; name a folder of images, or one of the data sets {names}")
        raise ValueError(f"{text}: there is no such folder of images, and no such data set; data sets: {names}")
    return DataSpec.of_folder(images_in(folder), image_shape)


def images_in(folder: Path) -> Path:
    """Where the images of a folder lie: of one that sample.py wrote in `images`, beside its grid."""
    return folder / IMAGES if (folder / RECORD).is_file() else folder
