"""Animations and pictures beside each other as one animated WebP, such as the one at the top of the README.

`python -m scripts.dev.strip --pictures a.gif b.gif c.png --out strip.webp`; all get the same height, and an animation that ends
earlier than others holds its last frame.
"""

from pathlib import Path

import numpy as np
from PIL import Image

from configs.errors import UserError
from flow.evaluation import animation
from flow.runtime import cli, commands, flags, messages
from flow.runtime.errors import cli_main

GAP = 12  # pixels between two pictures
EXAMPLES = """\
  python -m scripts.dev.strip --pictures animation/trajectory.gif docs/images/gallery/checkerboard/flow.gif \\
      runs/cifar10_cpu/evaluation_strip/nfe.png --out docs/images/strip.webp"""


def parse_args():
    parser = cli.Parser(__doc__, EXAMPLES)
    parser.add_argument(
        "--pictures", nargs="+", type=Path, required=True, metavar="FILE", help="GIF, WebP or PNG, from left to right"
    )
    flags.add_count_flag(parser, "--height", "pixels of the strip", 200, least=16)
    flags.add_output_flag(parser, use="output file, a WebP", metavar="FILE")
    return parser.parse(takes_keys=False)


def main() -> None:
    args = parse_args()
    columns = [frames_of(path, args.height) for path in args.pictures]
    count = max(map(len, columns))
    gap = np.full((args.height, GAP, 3), 255, dtype=np.uint8)
    strip = []
    for k in range(count):
        parts = [frames[min(k, len(frames) - 1)] for frames in columns]
        strip.append(np.concatenate([piece for part in parts for piece in (part, gap)][:-1], axis=1))
    animation.write_webp(args.out, strip)
    height, width, _ = strip[0].shape
    again = ["-m", "scripts.dev.strip", "--pictures", *args.pictures, "--height", str(max(16, height // 2)), "--out", args.out]
    result = f"{args.out}: {count} frames of {width}x{height} pixels, {args.out.stat().st_size / 2**20:.1f} MiB"
    print(messages.summary(result, args.start, f"make it smaller with: {commands.command(*again)}"))


def frames_of(path: Path, height: int) -> list[np.ndarray]:
    """The frames uint8 [height, W, 3] of a picture. Raises UserError for a file that is none."""
    try:
        with Image.open(path) as picture:
            width = round(picture.width * height / picture.height)
            frames = []
            for k in range(getattr(picture, "n_frames", 1)):
                picture.seek(k)
                frames.append(np.asarray(picture.convert("RGB").resize((width, height), Image.Resampling.LANCZOS)))
            return frames
    except OSError as error:
        raise UserError(f"--pictures {path}: is no picture ({error})") from None


if __name__ == "__main__":
    cli_main(main)
