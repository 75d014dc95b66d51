"""Images as people see them: uint8 conversion, PNG files, grids."""

import os
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.utils import make_grid

from flow.engine.files import TEMPORARY, naming


def to_uint8(x: Tensor) -> Tensor:
    """[-1, 1] floats to uint8 of the same shape, rounded to the nearest level; the one way back from networks."""
    return (x * 127.5 + 127.5).round().clamp(0, 255).to(torch.uint8)


def to_network(x: Tensor) -> Tensor:
    """What a data set holds as networks see it, float32: uint8 images go to [-1, 1]; pairs, latents and points are there."""
    return x.float().div_(127.5).sub_(1) if x.dtype == torch.uint8 else x.float()


def write_png(path: Path, image: Tensor) -> None:
    """Write a uint8 image [C, H, W] under its name once it is whole."""
    temporary = path.with_name(f"{TEMPORARY}{os.getpid()}-{path.name}")
    try:  # not files.atomic_file: syncing each of 50,000 small files takes longer than making them again
        with naming(path):
            to_pil(image).save(temporary, format="PNG")
            os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def read_png(path: Path) -> np.ndarray:
    """uint8 [H, W, C] of an image that `write_png` wrote."""
    with Image.open(path) as image:
        pixels = np.asarray(image)
    return pixels[:, :, None].copy() if pixels.ndim == 2 else pixels.copy()


def to_pil(image: Tensor) -> Image.Image:
    """uint8 [C, H, W] with 1 or 3 channels."""
    return Image.fromarray(image[0].numpy() if len(image) == 1 else image.permute(1, 2, 0).contiguous().numpy())


def from_pil(image: Image.Image) -> Tensor:
    """uint8 [C, H, W] of a grey or an RGB image."""
    pixels = torch.from_numpy(np.array(image))
    return pixels[None] if pixels.dim() == 2 else pixels.permute(2, 0, 1)


def point_cloud(points: Tensor, side: int = 400, reach: float = 2.5) -> Tensor:
    """Points [N, 2] as a picture uint8 [1, side, side] of the square from -reach to reach: the darker, the more of them."""
    cell = ((points.double().cpu() + reach) * (side / (2 * reach))).floor().long()
    x, y = cell[((cell >= 0) & (cell < side)).all(1)].T
    count = torch.zeros(side, side, dtype=torch.float64)
    count.index_put_((side - 1 - y, x), torch.ones_like(x, dtype=torch.float64), accumulate=True)
    count = torch.nn.functional.max_pool2d(count[None], 3, stride=1, padding=1)  # a point is three pixels wide
    return (255 * (1 - count / count.max().clamp(min=1)).sqrt()).to(torch.uint8)


def grid(images: Tensor, columns: int, transposed: bool = False, zoomed: bool = True) -> Tensor:
    """uint8 [N, C, H, W] side by side, as one uint8 [C', H', W'] picture, `zoomed` to at least 400 pixels.

    Image k stands in column k mod `columns`; with `transposed` in row k mod `columns`, where gaps at the end are black.
    """
    if transposed:
        gap = images.new_zeros(-len(images) % columns, *images.shape[1:])
        images = torch.cat([images, gap]).unflatten(0, (-1, columns)).transpose(0, 1).flatten(0, 1)
        columns = len(images) // columns
    picture = make_grid(images, nrow=columns, padding=1, pad_value=128)[: images.shape[1]]
    zoom = max(1, -(-400 // max(picture.shape[1:]))) if zoomed else 1
    return picture.repeat_interleave(zoom, 1).repeat_interleave(zoom, 2)


def beside(originals: Tensor, others: Tensor, columns: int = 8) -> Tensor:
    """uint8 [N, C, H, W] twice: rows of originals, each above the row of their counterparts, as one picture."""
    gap = originals.new_zeros(-len(originals) % columns, *originals.shape[1:])
    rows = [torch.cat([images, gap]).unflatten(0, (-1, columns)) for images in (originals, others)]
    return grid(torch.stack(rows, dim=1).flatten(0, 2), columns)
