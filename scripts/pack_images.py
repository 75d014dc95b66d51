"""Decode, crop and resize images once: `python -m scripts.pack_images --source photos --size 64 --save_dir data/photos64`.

The source is a folder of images (subfolders are classes), Parquet files as the Hugging Face hub stores them, a data set of
the hub (hf:owner/name) or a built-in one. In a folder with images and Parquet files, the latter are read with a flag that is
for them. `--save_dir` gets shards of pixels and labels and manifest.json; training then reads `data.name=packed
data.args.path=DIR` without decoding. Run it again after a kill: whole shards stay, missing or damaged ones are made again. The
result does not depend on the number of processes.
"""

import hashlib
import json
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

import datasets
from configs import loading
from configs.errors import UserError
from datasets import DataSet, hub
from datasets.encoded import EncodedImages, UnreadableImage
from datasets.folder import IMAGE_SUFFIXES, Folder, files_below
from datasets.packed import PATTERN
from datasets.parquet import NO_LABELS, Parquet, select_files
from datasets.shards import MANIFEST, list_shards, save_shard, stored_settings, verify_shard
from flow.runtime import cli, commands, distributed, files, flags, lock, messages
from flow.runtime.errors import CONTINUES, cli_main, error_context
from flow.runtime.output_dir import check_same_settings, write_missing

EXAMPLES = """\
  python -m scripts.pack_images --source photos --size 64 --save_dir data/photos64
  python -m scripts.pack_images --source cifar10 --split test --save_dir data/cifar10_test
  python -m scripts.pack_images --source downloads/afhq/train --size 64 --save_dir data/afhq64
  accelerate-launch --multi_gpu --num_processes 8 -m scripts.pack_images --source hf:owner/name --size 64 --save_dir data/x"""
HUB = "hf:"
BUILT_IN = ("digits", "mnist", "fashion_mnist", "cifar10")
SHARD_BYTES = (2**24, 2**29)  # of the pixels of a shard, at least and at most
PARQUET_FLAGS = ("split", "files", "image_column", "label_column")
NUM_SHARDS = 256  # of a set for which that is within SHARD_BYTES; so many files can be open at once
THREADS = 4  # that decode, a process
NAMED_IMAGES = 5  # of those that are left out, in a note


@dataclass
class Source:
    """What is packed."""

    data: DataSet
    identity: str  # changes with the images
    origin: dict[str, Any]  # {"name", "root", "args"}, for the manifest


def parse_args():
    parser = cli.Parser(__doc__, EXAMPLES)
    names = "|".join(BUILT_IN)
    parser.add_argument("--source", required=True, metavar="FOLDER|FILE|hf:OWNER/NAME|NAME", help=f"the images; NAME: {names}")
    flags.add_output_flag(parser, "--save_dir")
    flags.add_count_flag(
        parser, "--size", "side of the central square in pixels (default: images as they are, all of one size)"
    )
    parser.add_argument("--channels", type=int, choices=(1, 3), default=3, help="1: gray, 3: RGB (default: 3)")
    parser.add_argument("--split", metavar="NAME", help="of Parquet files and data sets (default: train, or the only one)")
    parser.add_argument("--files", metavar="PATTERN", help="of the paths of Parquet files, where there are several data sets")
    parser.add_argument("--revision", metavar="REV", help="branch, tag or commit on the hub (default: main)")
    parser.add_argument("--image_column", metavar="NAME", help="of Parquet files (default: the only one with images)")
    parser.add_argument("--label_column", metavar="NAME", help=f"of Parquet files (default: found); {NO_LABELS}: no labels")
    parser.add_argument("--skip_damaged", action="store_true", help="leave out images that cannot be decoded, and count them")
    flags.add_count_flag(parser, "--shard_images", "images per file (default: 16 to 512 MiB of pixels)")
    return parser.parse()


def main() -> None:
    args = parse_args()
    if others := [key for key in loading.overridden(args.overrides) if key != "data.root"]:
        raise UserError(f"{others[0]}: of the configuration only data.root has a meaning here; the images are --source")
    accelerator = distributed.build_accelerator()
    with error_context(f"--source {args.source}"):
        source = open_source(args, accelerator, loading.load(None, args.overrides).data.root)
    for note in source.data.notes:
        accelerator.print(f"note: {note}")
    if args.channels == 3 and begins_gray(source.data):
        accelerator.print("note: the first image is gray; --channels 1 packs gray images in a third of the space")
    with lock.folder(args.save_dir, accelerator):
        pack(args, accelerator, source)


def open_source(args, accelerator: Accelerator, root: str | None) -> Source:
    """The images that --source names. Raises ValueError where there are none, or where a flag does not apply to them."""
    of_hub, path = args.source.startswith(HUB), Path(args.source)
    names = [] if of_hub or args.source in BUILT_IN else parquet_files(path)
    tables = []
    if names and path.is_dir() and not any(getattr(args, flag) for flag in PARQUET_FLAGS) and holds_images(path):
        names, tables = [], names  # beside the images, as in folders of the hub
    for flag in ("files", "revision", "image_column", "label_column"):
        takes_flag = of_hub or (names and flag != "revision")
        if getattr(args, flag) is not None and not takes_flag:
            raise ValueError(f"--{flag} {getattr(args, flag)}: is for {'the hub' if flag == 'revision' else 'Parquet files'}")
    if of_hub:
        return from_hub(args, accelerator)
    if args.source in BUILT_IN:
        return built_in(args, accelerator, root)
    if names:
        return from_parquet(args, path.parent if path.is_file() else path, names, {"path": args.source})
    if path.is_file():
        raise ValueError(
            "is a file, not a Parquet file; name a folder of images (unpack an archive first), a Parquet file, hf:OWNER/NAME "
            f"or one of {', '.join(BUILT_IN)}"
        )
    if args.split is not None:
        raise ValueError(f"--split {args.split}: a folder of images has none; name the subfolder as --source")
    data = Folder(path, args.size, args.channels)
    if tables:
        data.notes.append(f"--source {path}: {tables[0]} is not read, as there are images; --split train reads Parquet files")
    arguments = {"path": args.source, "size": args.size, "channels": args.channels}
    return Source(data, listing(data), {"name": "folder", "root": None, "args": arguments})


def parquet_files(path: Path) -> list[str]:
    """The Parquet files at or below a path, relative to it or to its folder."""
    if path.is_dir():
        return sorted(p.relative_to(path).as_posix() for p in files_below(path) if p.suffix == ".parquet" and p.is_file())
    return [path.name] if path.suffix == ".parquet" and path.is_file() else []


def holds_images(folder: Path) -> bool:
    """Whether there are any at or below a folder, but for hidden ones."""
    images = (path.relative_to(folder) for path in files_below(folder) if path.suffix.lower() in IMAGE_SUFFIXES)
    return any(not any(part.startswith(".") for part in path.parts) for path in images)


def from_parquet(args, folder: Path, names: list[str], arguments: dict[str, Any]) -> Source:
    """A split of Parquet files."""
    split, selected = select_files(names, args.split, args.files)
    data = Parquet(folder, selected, args.size, args.channels, args.image_column, args.label_column)
    arguments |= {"split": split, "image_column": data.image_column, "label_column": data.label_column}
    name = "hub" if args.source.startswith(HUB) else "parquet"
    return Source(data, listing(data), {"name": name, "root": None, "args": arguments})


def from_hub(args, accelerator: Accelerator) -> Source:
    """A split of a data set on the hub, at the commit that the main process found."""
    repository = args.source.removeprefix(HUB)
    commit, names = distributed.decided_by_main(lambda: hub.list_files(repository, args.revision))
    try:
        _, selected = select_files(names, args.split, args.files)
    except ValueError as error:
        hint = "; the hub converts many data sets: --revision refs/convert/parquet" * ("no Parquet" in str(error))
        raise ValueError(f"{error}{hint}") from None
    folder = distributed.main_process_first(accelerator, lambda: hub.download(repository, commit, selected))
    return from_parquet(args, folder, selected, {"repository": repository, "revision": commit})


def built_in(args, accelerator: Accelerator, root: str | None) -> Source:
    """A data set that is complete as it is."""
    if args.size or args.channels != 3:
        flag = f"--size {args.size}" if args.size else f"--channels {args.channels}"
        raise ValueError(
            f"{flag}: {args.source} is packed as it is; resize it with scripts.export_images --size, and pack that folder"
        )
    splits = ("train", "test")
    if args.split not in (None, *splits):
        raise ValueError(f"--split {args.split}: must be one of {', '.join(splits)}")
    arguments: dict[str, Any] = {"split": args.split or "train"}
    if datasets.has_test_split(args.source):
        arguments = {"train": args.split != "test"}
    data = distributed.main_process_first(accelerator, lambda: datasets.build(args.source, root, arguments))
    return Source(data, data.fingerprint(), {"name": args.source, "root": root, "args": arguments})


def begins_gray(data: DataSet) -> bool:
    """Whether the first image is a file whose three channels are equal."""
    if not isinstance(data, EncodedImages):
        return False
    try:
        image = data.decode(0)
    except UnreadableImage:  # which packing names
        return False
    return bool((image == image[:1]).all())


def listing(data: EncodedImages) -> str:
    """Hash of the names and sizes of files; their content would take as long to read as to pack."""
    lines = [f"{file.relative_to(data.path).as_posix()} {file.stat().st_size}" for file in data.files]
    return hashlib.blake2b("\n".join(lines).encode(errors=files.NAMES), digest_size=16).hexdigest()


def pack(args, accelerator: Accelerator, source: Source) -> None:
    """Write the shards that are missing or damaged, then the manifest."""
    data = source.data
    per_shard = args.shard_images or default_shard_images(len(data), data.image_shape)
    settings = json.loads(json.dumps(settings_of(args, source, per_shard)))
    distributed.check_same(accelerator, settings, f"--source {args.source}")
    if accelerator.is_main_process:
        check_same_settings(args.save_dir, stored_settings(args.save_dir, PATTERN), settings, "images", "pack_images")
    accelerator.wait_for_everyone()
    cuts = [range(len(data))[i : i + per_shard] for i in range(0, len(data), per_shard)]
    plan = {args.save_dir / f"images_{i:05d}.safetensors": cut for i, cut in enumerate(cuts)}
    with ThreadPoolExecutor(THREADS) as pool:

        def write(path: Path, cut: range, bar) -> None:
            with error_context("--source"):
                tensors, skipped = read_shard_images(data, cut, args.skip_damaged, pool, bar)
            with files.atomic_file(path) as temporary:
                save_shard(temporary, tensors, {"settings": settings, "skipped": skipped})

        num_written = write_missing(accelerator, plan, verify_shard, write, "packing (images of this process)")
    if accelerator.is_main_process:
        manifest = write_manifest(args.save_dir, source, settings, list(plan))
        report(args, manifest, num_written)
    accelerator.wait_for_everyone()


def default_shard_images(count: int, image_shape: Sequence[int]) -> int:
    """Images per file: few files for large sets, several for small ones, as processes take whole files."""
    size = torch.Size(image_shape).numel()
    (low, high) = SHARD_BYTES
    return max(1, low // size, min(-(-count // NUM_SHARDS), high // size))


def settings_of(args, source: Source, per_shard: int) -> dict[str, Any]:
    """The settings that determine every shard, which are part of its header."""
    data = source.data
    origin = source.origin["args"]
    return {
        "revision": origin.get("revision"),
        "split": origin.get("split"),
        "size": args.size,
        "crop": "center" if args.size else None,
        "image_shape": data.image_shape,
        "columns": [origin.get("image_column"), origin.get("label_column")],
        "count": len(data),
        "source": source.identity,
        "shard_images": per_shard,
    }


def read_shard_images(
    data: DataSet, cut: range, skip_damaged: bool, pool: ThreadPoolExecutor, bar
) -> tuple[dict[str, Tensor], list[str]]:
    """The tensors of the images `cut`, and the names of those that were left out. Raises ValueError that names an image that is
    damaged, or has another size."""

    def read(k: int) -> Tensor | None:
        try:
            return data[k][0]
        except UnreadableImage:
            if not skip_damaged:
                raise
            return None

    images = torch.empty((len(cut), *data.image_shape), dtype=torch.uint8)
    readable = []
    skipped = []
    for k, image in zip(cut, pool.map(read, cut), strict=True):
        if image is None:
            assert isinstance(data, EncodedImages)
            skipped.append(data.name_of(k))
        else:
            images[len(readable)] = image
            readable.append(k)
        bar.update()
    tensors = {"images": images[: len(readable)]}
    return tensors if data.labels is None else tensors | {"labels": data.labels[readable]}, skipped


def write_manifest(save_dir: Path, source: Source, settings: dict[str, Any], shards: list[Path]) -> dict[str, Any]:
    """manifest.json, last of all. Raises UserError where no image was readable."""
    listed, headers = list_shards(save_dir, (path.name for path in shards))
    manifest = {
        **settings,
        "images": sum(entry["images"] for entry in listed["shards"]),
        "bytes": sum(entry["bytes"] for entry in listed["shards"]),
        "skipped": [name for header in headers for name in header["skipped"]],
        "class_names": source.data.class_names if source.data.labels is not None else (),
        "data": source.origin,
        **listed,
    }
    if not manifest["images"]:
        raise UserError(f"--source: none of {settings['count']} images can be decoded, such as {manifest['skipped'][0]}")
    files.write_text(save_dir / MANIFEST, json.dumps(manifest, indent=1))
    return manifest


def report(args, manifest: dict[str, Any], num_written: int) -> None:
    """Say what was left out, what was written, and how to train on it."""
    if skipped := manifest["skipped"]:
        print(f"note: left out {len(skipped)} images that cannot be decoded ({messages.first_names(skipped, NAMED_IMAGES)})")
    kind = f"{manifest['images']:,} images of {'x'.join(map(str, manifest['image_shape']))}"
    classes = f", {len(manifest['class_names'])} classes" if manifest["class_names"] else ""
    result = f"{kind}{classes} ({manifest['bytes'] / 1e6:.1f} MB) in {args.save_dir}, {num_written:,} of the source read now"
    print(messages.summary(result, args.start, f"train on them with: {train_command(args, manifest['image_shape'])}"))


def train_command(args, image_shape: list[int]) -> str:
    """The command that trains on these images."""
    _, height, width = image_shape
    overrides = ["data.name=packed", commands.override("data.args.path", str(args.save_dir))]
    if args.source in BUILT_IN:
        overrides.append("data.horizontal_flip=false")
    return commands.train_photos_command(args.save_dir.name, height, width, *overrides)


if __name__ == "__main__":
    cli_main(main, CONTINUES)
