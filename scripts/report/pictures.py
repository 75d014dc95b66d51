"""Pictures of a page: WebP as data URIs within a budget, or files beside the page."""

import base64
import hashlib
from collections.abc import Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import TypeVar

from PIL import Image, ImageSequence

from flow.runtime import files
from flow.sampling.images import encode_webp, to_webp
from scripts.report.runs import version

MAX_SIDE = 1600  # pixels of a side; larger pictures are scaled down
MAX_PIXELS = 2**27  # of all frames of a picture
UNREADABLE = (OSError, ValueError, SyntaxError, EOFError, MemoryError, Image.DecompressionBombError)  # what Pillow raises

GIF_END = b";"

T = TypeVar("T")


class Pictures:
    """Gives each picture its address in a page; `folder` None: inside the page, as long as `budget` bytes allow it."""

    def __init__(self, folder: Path | None, budget: int):
        self.folder, self.budget, self.left = folder, budget, budget
        self._problems: list[str] = []
        self.left_out = 0
        self.written: set[str] = set()  # names of files in the folder

    def has_room(self, reserved: float) -> bool:
        """Whether more than this share of the budget is left."""
        return self.folder is not None or self.left > reserved * self.budget

    def take_problems(self) -> list[str]:
        """Lines on the damaged pictures since the last call."""
        problems = self._problems
        self._problems = []
        return problems

    def source(self, path: Path) -> str | None:
        """The address of a picture; None for one that is damaged, or that there is no room for."""
        try:
            kind, content = encoded(path, *version(path))
        except UNREADABLE as error:
            self._problems.append(f"{path}: is no picture ({type(error).__name__})")
            return None
        if self.folder is not None:
            name = f"{hashlib.sha256(content).hexdigest()[:20]}.{kind}"
            if not (self.folder / name).exists():
                files.write_bytes(self.folder / name, content)
            self.written.add(name)
            return f"{self.folder.name}/{name}"
        size = -(-len(content) // 3) * 4
        if size > self.left:
            self.left_out += 1
            return None
        self.left -= size
        return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"


@lru_cache(maxsize=2048)  # a page that is built again and again encodes what is new
def encoded(path: Path, modified: int, size: int) -> tuple[str, bytes]:
    """(webp or gif, content) of a PNG, WebP or GIF: `images.to_webp`, and WebP of a usual size as it is. Raises UNREADABLE."""
    with Image.open(path, formats=("PNG", "WEBP", "GIF")) as file:
        frames = getattr(file, "n_frames", 1)
        if file.width * file.height * frames > MAX_PIXELS:
            raise ValueError("it has too many pixels")
        if file.format == "GIF" and not path.read_bytes().rstrip(b"\0").endswith(GIF_END):
            raise EOFError  # Pillow takes the frames that are there for all of them
        if frames > 1:
            return _animation(path, file)
        image = file.convert("RGBA" if file.has_transparency_data else "RGB")  # decodes it, which finds damage
        if file.format == "WEBP" and max(file.size) <= MAX_SIDE:
            return "webp", path.read_bytes()
    image.thumbnail((MAX_SIDE, MAX_SIDE))
    return "webp", to_webp(image)


def spread(items: Sequence[T]) -> Iterator[T]:
    """The items so that each beginning of the sequence is spread over all of them: the last, the first, the middle, ..."""
    if items:
        yield items[-1]
    gaps = [(0, len(items) - 1)]
    if len(items) > 1:
        yield items[0]
    while gaps:
        low, high = gaps.pop(0)
        middle = (low + high) // 2
        if low < middle < high:
            yield items[middle]
            gaps += [(low, middle), (middle, high)]


def _animation(path: Path, image: Image.Image) -> tuple[str, bytes]:
    """The smaller of the GIF as it is and of lossless WebP."""
    frames, durations = [], []
    for frame in ImageSequence.Iterator(image):
        frames.append(frame.convert("RGB"))
        durations.append(frame.info.get("duration", 100))
    first, *rest = frames
    webp = encode_webp(first, lossless=True, save_all=True, append_images=rest, duration=durations, loop=0)
    original = path.read_bytes()
    return ("webp", webp) if len(webp) < len(original) else ("gif", original)
