"""Write a built-in data set as a folder of PNG files: `python -m scripts.export_images --save_dir DIR data.name=mnist`.

Classes become subfolders, which `data.name=folder` reads back as labels.
"""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from accelerate import Accelerator
from PIL import Image, ImageOps

from configs import loading
from configs.errors import UserError
from datasets import DataSpec
from flow.runtime import cli, commands, distributed, files, flags, lock, messages
from flow.runtime.errors import cli_main, error_context
from flow.sampling import images
from flow.sampling.space import Space

EXAMPLES = "  python -m scripts.export_images --save_dir data/mnist64 --size 64 data.name=mnist"
AHEAD = 1000  # images a round


def parse_args():
    parser = cli.Parser(__doc__, EXAMPLES)
    flags.add_output_flag(parser, "--save_dir")
    flags.add_count_flag(parser, "--size", "side in pixels (default: that of the data set)")
    flags.add_count_flag(parser, "--n_images", "the first N (default: all)")
    return parser.parse()


def main() -> None:
    args = parse_args()
    if other := next((key for key in loading.overridden(args.overrides) if not key.startswith("data.")), None):
        raise UserError(f"{other}: only keys of data have a meaning here")
    source = loading.load(None, args.overrides).data
    accelerator = distributed.build_single_process_accelerator("export_images")
    with error_context("data"):
        data = DataSpec.of(source).build()
        if not Space(data.image_shape, data.codec).is_pixels:
            raise ValueError(f"data.name={source.name}: holds no images; use mnist, folder or another set of pixels")
    if args.save_dir.is_symlink():  # the folder behind it is replaced
        args.save_dir = args.save_dir.resolve()
    with lock.unfinished(args.save_dir) as new:
        if args.save_dir.exists() and not files.is_empty_dir(args.save_dir):
            raise UserError(f"--save_dir {args.save_dir}: exists already; name another folder")
        count = export(args, accelerator, data, new)
        files.atomic_rename_dir(new, args.save_dir)
    height, width = (args.size, args.size) if args.size else data.image_shape[1:]
    folder = {"path": str(args.save_dir), "size": None, **({"channels": 1} if data.image_shape[0] == 1 else {})}
    overrides = ["data.horizontal_flip=false", commands.override("data.args", folder)]
    train = commands.train_photos_command(args.save_dir.name, height, width, *overrides)
    print(messages.summary(f"{count} images in {args.save_dir}", args.start, f"train on them with: {train}"))


def export(args, accelerator: Accelerator, data, into: Path) -> int:
    """Write each image of the data set to the folder of its class, below `into`, or there without classes. The number of
    images."""
    count = min(args.n_images or len(data), len(data))
    names = data.class_names if data.labels is not None else ()  # pairs without labels still name the classes of real images
    cleaned = [name.replace("/", "-") for name in names]
    if len(set(cleaned)) < len(cleaned) or any(not name or name.startswith(".") for name in cleaned):
        raise UserError(f"data: classes {', '.join(names)} do not name folders: these must differ and not begin with a dot")
    folders = [into / name for name in cleaned]
    for folder in folders:
        folder.mkdir(parents=True, exist_ok=True)

    def write(k: int) -> None:
        image, label = data[k]
        image = images.to_uint8(image) if image.is_floating_point() else image  # of pairs
        folder = folders[label] if folders else into
        images.write_png(folder / f"{k:06d}.png", resized(image, args.size) if args.size else image)

    with ThreadPoolExecutor(4) as pool, distributed.progress(accelerator, count, "images") as bar:
        for start in range(0, count, AHEAD):
            part = range(start, min(start + AHEAD, count))
            with error_context("data"):
                list(pool.map(write, part))
            bar.update(len(part))
    return count


def resized(image: torch.Tensor, size: int) -> torch.Tensor:
    """uint8 [C, H, W] -> [C, size, size]: the central square, by Lanczos."""
    picture = ImageOps.fit(images.to_pil(image), (size, size), Image.Resampling.LANCZOS)
    return images.from_pil(picture)


if __name__ == "__main__":
    cli_main(main)
