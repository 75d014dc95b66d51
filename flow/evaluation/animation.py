"""Frames as GIF, as WebP, and as MP4 where ffmpeg is installed."""

import shutil
import subprocess
from pathlib import Path

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image, ImageDraw, ImageFont

from flow.runtime import files

WEBP_QUALITY = 60  # of an animated WebP, from 0 to 100
COLORS = 128  # of a GIF: flat drawings need no more, and the file stays small
SECONDS = 4.0  # of a GIF, before its end is held
BAR_HEIGHT = 32  # pixels of the bar of time


def figure_to_array(figure: Figure) -> np.ndarray:
    """The figure as pixels, uint8 [H, W, 3]."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[:, :, :3].copy()


def with_time_bar(frame: np.ndarray, t: float, start: str = "noise") -> np.ndarray:
    """The frame uint8 [H, W, 3] above a bar from `start` (t = 0) to data (t = 1) that is filled up to t: [H + 32, W, 3]."""
    width = frame.shape[1]
    middle = BAR_HEIGHT // 2
    strip = Image.new("RGB", (width, BAR_HEIGHT), "white")
    draw, font = ImageDraw.Draw(strip), ImageFont.load_default(13)
    left, right = 52, max(60, width - 106)
    here = round(left + (right - left) * t)
    draw.line([(left, middle), (right, middle)], fill=(204, 204, 204), width=4)
    draw.line([(left, middle), (here, middle)], fill=(89, 89, 89), width=4)
    draw.ellipse([here - 6, middle - 6, here + 6, middle + 6], fill=(89, 89, 89))
    draw.text((left - 10, middle), start, fill="black", font=font, anchor="rm")
    draw.text((right + 10, middle), "data", fill="black", font=font, anchor="lm")
    draw.text((width - 6, middle), f"t = {t:.2f}", fill="black", font=font, anchor="rm")
    return np.concatenate([frame, np.asarray(strip)])


def write(path: Path, frames: list[np.ndarray]) -> list[str]:
    """The frames uint8 [H, W, 3] as the GIF `path` and, where ffmpeg is installed, the same as MP4; the names of the files.

    The MP4 is left out where ffmpeg fails, with a note.
    """
    write_gif(path, frames)
    video = path.with_suffix(".mp4")
    if not shutil.which("ffmpeg"):
        video.unlink(missing_ok=True)  # of an earlier call, with other frames
        return [path.name]
    try:
        write_mp4(video, frames)
    except subprocess.CalledProcessError as error:
        video.unlink(missing_ok=True)  # of an earlier call, with other frames
        print(f"note: no {video.name}, as ffmpeg ended with status {error.returncode}")
        return [path.name]
    return [path.name, video.name]


def write_gif(path: Path, frames: list[np.ndarray], seconds: float = SECONDS, hold_seconds: float = 1.5) -> None:
    """Frames uint8 [H, W, 3] that last `seconds` in total; the last frame is held before the loop restarts."""
    sheet = np.concatenate([frames[i] for i in (0, len(frames) // 2, -1)]).reshape(-1, 3)
    # One palette for all frames, so that colors do not flicker. A color counts by the root of its number of pixels, so that
    # small dots keep theirs.
    codes, counts = np.unique(sheet @ np.array([1 << 16, 1 << 8, 1]), return_counts=True)  # numbers sort faster than rows
    shades = np.stack([codes >> 16, codes >> 8 & 255, codes & 255], axis=1).astype(np.uint8)
    weighted = np.repeat(shades, np.sqrt(counts).astype(int), axis=0)
    palette = Image.fromarray(weighted[None]).quantize(COLORS, kmeans=3, dither=Image.Dither.NONE)
    indexed = [Image.fromarray(frame).quantize(palette=palette, dither=Image.Dither.NONE) for frame in frames]
    _save(path, indexed, "GIF", seconds, hold_seconds, optimize=False)


def write_webp(path: Path, frames: list[np.ndarray], seconds: float = SECONDS, hold_seconds: float = 1.5) -> None:
    """The same as an animated WebP, which for photos is a third as large as a GIF."""
    _save(path, [Image.fromarray(frame) for frame in frames], "WEBP", seconds, hold_seconds, quality=WEBP_QUALITY, method=6)


def _save(path: Path, pictures: list[Image.Image], kind: str, seconds: float, hold_seconds: float, **options: int) -> None:
    each = max(20, round(1000 * seconds / len(pictures)))
    durations = [each] * (len(pictures) - 1) + [each + round(1000 * hold_seconds)]
    first, *others = pictures
    with files.atomic_file(path) as temporary:
        first.save(temporary, kind, save_all=True, append_images=others, duration=durations, loop=0, **options)


def write_mp4(path: Path, frames: list[np.ndarray]) -> None:
    """The same as a video, by ffmpeg. Raises CalledProcessError where it fails."""
    height, width = (side // 2 * 2 for side in frames[0].shape[:2])  # even, as video coders want them
    command = ["ffmpeg", "-loglevel", "error", "-y", "-f", "rawvideo", "-pix_fmt", "rgb24", "-s", f"{width}x{height}"]
    command += ["-r", f"{len(frames) / SECONDS:g}", "-i", "-", "-pix_fmt", "yuv420p"]
    content = b"".join(frame[:height, :width].tobytes() for frame in frames)
    with files.atomic_file(path) as temporary:
        subprocess.run([*command, f"file:{temporary}"], input=content, check=True)  # a colon would begin a protocol
