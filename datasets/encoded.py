"""Image files that are decoded one by one: the base class of folders and Parquet files, and how a file becomes pixels."""

import hashlib
from abc import ABC, abstractmethod
from functools import cached_property
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

# What Pillow may read, whatever a file is called: among its other formats is EPS, for which it starts Ghostscript.
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "TIFF", "GIF")


class UnreadableImage(ValueError):
    """An image that cannot be decoded: what a set that is packed may leave out."""


class EncodedImages(ABC):
    """Image files (PNG, JPEG, ...), decoded on access: center crop to a square, resize to `size`.

    Alpha is laid over white, rotation flags of cameras are applied, of an animation the first frame counts. A subclass says
    what there is to open.
    """

    codec = None  # pixels
    access = "files"
    notes: list[str]  # lines about what was skipped
    labels: Tensor | None  # int64 [N]
    class_names: tuple[str, ...]
    image_shape: tuple[int, ...]

    def __init__(self, path: Path, files: list[Path], size: int | None, channels: int):
        """
        Args:
            path: what the names of images are relative to.
            files: those that hold the images.
            size: side in pixels, or None to take images as they are, which then must all have one size.
            channels: 1 (gray) or 3 (RGB).
        """
        self.path, self.files, self.size, self.channels = path, files, size, channels

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def name_of(self, index: int) -> str:
        """Where an image lies, relative to `path`."""

    @abstractmethod
    def encoded(self, index: int) -> Path | BinaryIO:
        """What Pillow reads the image from."""

    def decode(self, index: int) -> Tensor:
        """Image uint8 [C, H, W] of any size. Raises UnreadableImage that names it."""
        source = self.encoded(index)
        try:
            return read_image(source, self.size, self.channels)
        except Exception as error:  # Pillow raises a dozen kinds for a broken file
            # whose own words for this kind hold the address of an object in memory
            reason = f"its content is none of {', '.join(FORMATS)}" if isinstance(error, UnidentifiedImageError) else error
            raise UnreadableImage(
                f"{self.path / self.name_of(index)}: not a readable image ({reason}); remove it, or leave out such images with "
                "`python -m scripts.pack_images --skip_damaged`"
            ) from None

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        """Image uint8 [C, H, W] and its label (-1 without classes). Raises UnreadableImage that names it, and ValueError where
        it has another size than the first one."""
        image = self.decode(index)
        if tuple(image.shape) != self.image_shape:
            (_, height, width), (_, *expected) = image.shape, self.image_shape
            name = self.path / self.name_of(index)
            raise ValueError(
                f"{name}: has {height}x{width} pixels, expected {expected[0]}x{expected[1]}; resize the images, or read them "
                "with data.args.size=N in a training, --size N in scripts.pack_images"
            )
        return image, -1 if self.labels is None else int(self.labels[index])

    def fingerprint(self) -> str:
        """Hash of the content: the bytes of the files in order, the crop and the size."""
        return self._fingerprint

    @cached_property
    def _fingerprint(self) -> str:
        digest = hashlib.blake2b(f"{self.size} {self.channels}".encode(), digest_size=16)
        for file in self.files:
            digest.update(hashlib.blake2b(file.read_bytes(), digest_size=16).digest())
        return digest.hexdigest()

    def _measure(self) -> None:
        """Set `image_shape`: of the size that was given, or of the first image that can be read.

        Raises UnreadableImage that names the first one, where none can.
        """
        if self.size is not None:
            self.image_shape = (self.channels, self.size, self.size)
            return
        first_error = None
        for index in range(len(self)):
            try:
                self.image_shape = tuple(self.decode(index).shape)
                return
            except UnreadableImage as error:
                first_error = first_error or error
        assert first_error is not None  # a data set is not empty
        raise first_error


def check_format(size: int | None, channels: int) -> None:
    """Raises ValueError for a size or a number of channels that no image has."""
    if type(channels) is not int or channels not in (1, 3):
        raise ValueError(f"channels={channels!r}: must be 1 (gray) or 3 (RGB)")
    if size is not None and (type(size) is not int or size < 1):
        raise ValueError(f"size={size!r}: must be a whole number of at least 1, or null")


def read_image(source: Path | BinaryIO, size: int | None, channels: int) -> Tensor:
    """The image in an encoded file, uint8 [C, H, W]; with a size the central square, resized by Lanczos."""
    with Image.open(source, formats=FORMATS) as opened:
        image = ImageOps.exif_transpose(opened)
        if image.mode in ("I", "F"):
            raise ValueError(f"mode {image.mode}: 32 bits a pixel, of unknown range; expected 8 or 16")
        if image.mode.startswith("I;16"):  # Pillow's own conversion would clip 16 bits to white
            image = Image.fromarray((np.asarray(image).astype(np.float64) / 257).round().clip(0, 255).astype(np.uint8))
        if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
            rgba = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba)
        image = image.convert("L" if channels == 1 else "RGB")
        if size is not None:
            side = min(image.size)  # cropped first, so that nothing beyond the crop bleeds into its border
            left, top = (image.width - side) // 2, (image.height - side) // 2
            image = image.crop((left, top, left + side, top + side))
            image = image.resize((size, size), Image.Resampling.LANCZOS)
        pixels = np.array(image)
    return torch.from_numpy(pixels).reshape(pixels.shape[0], pixels.shape[1], channels).permute(2, 0, 1)
