"""Images as people see them: uint8 conversion, PNG and WebP files, grids."""

import io
import math
import os
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from flow.runtime.files import naming, temporary_path

FONT_SIZE = 13  # pixels
LINE_HEIGHT = 16
MAX_CHANNELS = 4  # of a PNG file
MIN_CELL = 48  # pixels of an image in a grid with names
MAX_CELL = 100  # to which it is enlarged for the sake of a long word above it
NAME_WIDTH = 180  # pixels, at most, of names on the left
SMALL_WEBP = 30_000  # bytes; of a larger lossless WebP a lossy version is tried as well
WEBP_QUALITY = 85  # of lossy WebP


def to_uint8(x: Tensor) -> Tensor:
    """[-1, 1] floats to uint8 of the same shape, rounded to the nearest level; the one way back from networks."""
    return (x * 127.5 + 127.5).round().clamp(0, 255).to(torch.uint8)


def write_png(path: Path, image: Tensor) -> None:
    """Write a uint8 image [C, H, W] under its name once it is whole."""
    temporary = temporary_path(path)
    try:  # not files.atomic_file: syncing each of 50,000 small files takes longer than making them again
        with naming(path):
            to_pil(image).save(temporary, format="PNG")
            os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


class ImageWriter:
    """Encodes images as folder/000000.png and so on in threads, while the next batch is computed."""

    THREADS = 4

    def __init__(self, folder: Path, max_pending: int = 400):
        """max_pending: images that wait to be written; more block the caller, so that memory stays bounded."""
        self.folder, self.max_pending = folder, max_pending
        self._pool = ThreadPoolExecutor(self.THREADS)
        self._pending: deque[Future] = deque()

    def write(self, indices: range, images: Tensor) -> None:
        """Write uint8 images [n, C, H, W] under their indices. Errors of earlier writes are raised here."""
        for k, image in zip(indices, images, strict=True):
            self._pending.append(self._pool.submit(write_png, png_path(self.folder, k), image))
        while len(self._pending) > self.max_pending:
            self._pending.popleft().result()

    def __enter__(self) -> "ImageWriter":
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        """Wait for all images. Raises the first error of a write."""
        try:
            while self._pending and kind is None:
                self._pending.popleft().result()
        finally:
            self._pool.shutdown(cancel_futures=True)


def png_path(folder: Path, index: int) -> Path:
    return folder / f"{index:06d}.png"


def is_whole_png(path: Path, shape: tuple[int, ...] | None = None) -> bool:
    """Whether all chunks of the file are there and have their checksums, and the image has this shape (C, H, W), where one is
    given; the pixels are not decoded."""
    try:
        with Image.open(path, formats=("PNG",)) as image:
            image.verify()
            return shape is None or (len(image.getbands()), image.height, image.width) == shape
    except (OSError, SyntaxError):  # Pillow's SyntaxError: a broken file
        return False


def read_png(path: Path) -> np.ndarray:
    """uint8 [H, W, C] of an image that `write_png` wrote."""
    with Image.open(path, formats=("PNG",)) as image:
        pixels = np.asarray(image)
    return pixels[:, :, None].copy() if pixels.ndim == 2 else pixels.copy()


def to_pil(image: Tensor) -> Image.Image:
    """uint8 [C, H, W] with one (gray), two (gray and alpha), three (RGB) or four (RGBA) channels."""
    return Image.fromarray(image[0].numpy() if len(image) == 1 else image.permute(1, 2, 0).contiguous().numpy())


def to_webp(image: Image.Image) -> bytes:
    """A WebP file of a gray or RGB(A) image: lossless, or lossy where that is smaller and lossless is large."""
    lossless = encode_webp(image, lossless=True)
    if len(lossless) < SMALL_WEBP:
        return lossless
    return min(lossless, encode_webp(image, quality=WEBP_QUALITY), key=len)


def encode_webp(image: Image.Image, **options: Any) -> bytes:
    """The content of a WebP file with these options of Pillow."""
    content = io.BytesIO()
    image.save(content, "WEBP", method=2, **options)
    return content.getvalue()


def from_pil(image: Image.Image) -> Tensor:
    """uint8 [C, H, W] of a gray or an RGB image."""
    pixels = torch.from_numpy(np.array(image))
    return pixels[None] if pixels.dim() == 2 else pixels.permute(2, 0, 1)


EXTENT = 2.5  # of pictures of points, whose data sets have about unit variance


def scatter_image(points: Tensor, side: int = 400) -> Tensor:
    """Points [N, 2] as a picture uint8 [1, side, side] of the square from -EXTENT to EXTENT: the darker, the more of them."""
    cell = ((points.double().cpu() + EXTENT) * (side / (2 * EXTENT))).floor().long()
    x, y = cell[((cell >= 0) & (cell < side)).all(1)].T
    count = torch.zeros(side, side, dtype=torch.float64)
    count.index_put_((side - 1 - y, x), torch.ones_like(x, dtype=torch.float64), accumulate=True)
    count = torch.nn.functional.max_pool2d(count[None], 3, stride=1, padding=1)  # a point is three pixels wide
    return (255 * (1 - count / count.max().clamp(min=1)).sqrt()).to(torch.uint8)


def shown_channels(channels: int) -> int:
    """How many of so many channels a picture shows, from the first on: three as red, green and blue, or one as gray."""
    return 3 if channels >= 3 else 1


def grid(images: Tensor, columns: int, transposed: bool = False, zoomed: bool = True, zoom: int = 1) -> Tensor:
    """uint8 [N, C, H, W] side by side, as one uint8 [C', H', W'] picture, enlarged by the whole factor `zoom`; with `zoomed` by
    more where its longer side would have fewer than 400 pixels. Of C channels it has the `shown_channels`.

    Image k stands in column k mod `columns`; with `transposed` in row k mod `columns`, where gaps at the end are black.
    """
    images = images[:, : shown_channels(images.shape[1])]
    if transposed:
        gap = images.new_zeros(-len(images) % columns, *images.shape[1:])
        images = torch.cat([images, gap]).unflatten(0, (-1, columns)).transpose(0, 1).flatten(0, 1)
        columns = len(images) // columns
    columns = min(columns, len(images))
    gap = images.new_full((-len(images) % columns, *images.shape[1:]), 128)
    rows = F.pad(torch.cat([images, gap]), (0, 1, 0, 1), value=128).unflatten(0, (-1, columns))  # [R, columns, C, H, W]
    picture = F.pad(torch.cat(torch.cat(list(rows), dim=-2).unbind(), dim=-1), (1, 0, 1, 0), value=128)
    zoom = max(zoom, -(-400 // max(picture.shape[1:]))) if zoomed else zoom
    return picture.repeat_interleave(zoom, 1).repeat_interleave(zoom, 2)


def side_by_side_grid(originals: Tensor, others: Tensor, columns: int = 8) -> Tensor:
    """uint8 [N, C, H, W] twice: rows of originals, each above the row of their counterparts, as one picture."""
    gap = originals.new_zeros(-len(originals) % columns, *originals.shape[1:])
    rows = [torch.cat([images, gap]).unflatten(0, (-1, columns)) for images in (originals, others)]
    return grid(torch.stack(rows, dim=1).flatten(0, 2), columns)


def labelled_grid(images: Tensor, columns: int, names: Sequence[str], transposed: bool = False) -> Tensor:
    """`grid` with the name of each column above it; with `transposed`, of each row on its left.

    `names[k]` belongs to column (row) k; no names leave the margin out. Names that the font cannot draw are replaced by
    their numbers, see `margin_names`.
    """
    columns = min(columns, len(images))
    if not names:
        return grid(images, columns, transposed)
    shown = margin_names(names)[0][:columns]
    words = [] if transposed else [_font().getlength(word) for name in shown for word in name.split()]
    zoom = math.ceil(max(MIN_CELL, min(max(words, default=0.0) + 4, MAX_CELL)) / (images.shape[-1] + 1))
    picture = grid(images, columns, transposed, zoom=zoom)
    if transposed:
        margin = _names_on_the_left(shown, pitch=picture.shape[1] // columns, height=picture.shape[1])
    else:
        margin = _names_above(shown, pitch=picture.shape[2] // columns, width=picture.shape[2])
    return torch.cat([from_pil(margin).expand(len(picture), -1, -1), picture], dim=2 if transposed else 1)


def _names_above(names: Sequence[str], pitch: int, width: int) -> Image.Image:
    """A margin of this width, with a name in the middle of each `pitch` pixels."""
    blocks = [_wrapped(name, pitch - 4, most=4) for name in names]
    height = 6 + LINE_HEIGHT * max(map(len, blocks))
    margin = Image.new("L", (width, height), 255)
    for k, block in enumerate(blocks):
        top = height - 3 - LINE_HEIGHT * len(block)
        for i, line in enumerate(block):
            ImageDraw.Draw(margin).text(((k + 0.5) * pitch, top + LINE_HEIGHT * i), line, fill=0, font=_font(), anchor="ma")
    return margin


def _names_on_the_left(names: Sequence[str], pitch: int, height: int) -> Image.Image:
    """A margin of this height, with a name halfway down each `pitch` pixels."""
    blocks = [_wrapped(name, NAME_WIDTH, most=max(1, pitch // LINE_HEIGHT)) for name in names]
    width = 8 + max(round(_font().getlength(line)) for block in blocks for line in block)
    margin = Image.new("L", (width, height), 255)
    for k, block in enumerate(blocks):
        top = (k + 0.5) * pitch - LINE_HEIGHT * len(block) / 2
        for i, line in enumerate(block):
            ImageDraw.Draw(margin).text((width - 4, top + LINE_HEIGHT * i), line, fill=0, font=_font(), anchor="ra")
    return margin


def margin_names(names: Sequence[str]) -> tuple[list[str], list[str]]:
    """The names as a margin shows them, and the lines of a legend: one for each that the font has no glyphs for, which the
    margin shows as #1, #2, ..."""
    missing = {k for k, name in enumerate(names) if not all(map(_has_glyph, name))}
    shown = [f"#{k + 1}" if k in missing else name for k, name in enumerate(names)]
    return shown, [f"#{k + 1}: {names[k]}" for k in sorted(missing)]


@cache
def _font() -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(FONT_SIZE)


@cache
def _has_glyph(character: str) -> bool:
    """Whether the font draws a character as something else than the box of one that it does not have."""
    return character == " " or bytes(_font().getmask(character)) != bytes(_font().getmask("\U0010ffff"))


def _wrapped(text: str, width: int, most: int) -> list[str]:
    """The text in at most so many lines of that many pixels; what does not fit ends in dots."""
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if lines[-1] and _font().getlength(longer) > width:
            lines.append(word)
        else:
            lines[-1] = longer
    if len(lines) > most:
        lines = [*lines[: most - 1], " ".join(lines[most - 1 :])]
    return [_cut(line, width) for line in lines]


def _cut(line: str, width: int) -> str:
    if _font().getlength(line) <= width:
        return line
    while line and _font().getlength(f"{line}...") > width:
        line = line[:-1]
    return f"{line}..."


def psnr(images: Tensor, others: Tensor) -> Tensor:
    """Peak signal-to-noise ratio [B] in decibels of uint8 images [B, C, H, W]: 10 log10(255^2 / mean squared difference), at
    most 100."""
    error = (images.double() - others.double()).square().flatten(1).mean(1)
    return (10 * torch.log10(255**2 / error)).clamp(max=100)
