"""Encode images to latents once: `python -m scripts.cache_latents --vae FOLDER --save_dir DIR data.name=folder ...`.

The posterior (mean and std) of every image and of its mirror image goes to shards, with labels; training then reads
`data.name=latents data.args.path=DIR`. Image k is encoded beside the same others whatever the number of processes. Run it
again after a kill: whole shards stay, missing or damaged ones are encoded again. --check N decodes N of the latents,
writes originals beside reconstructions, PSNR and the Frechet distance between the two (rFID).
"""

import hashlib
import json
import math
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from omegaconf import OmegaConf
from torch import Tensor

import datasets
from configs import loading, schema
from configs.errors import UserError
from configs.vae import VaeConfig
from datasets import DataSet, DataSpec, reading
from datasets.images import to_float
from datasets.shards import MANIFEST, list_shards, save_shard, stored_settings, verify_shard
from flow.evaluation.features import Extractor, FeatureSet, merge
from flow.evaluation.frechet import frechet_distance, too_few_images_message
from flow.evaluation.intervals import mean_standard_error
from flow.noise import generator
from flow.runtime import cli, commands, distributed, files, flags, lock, messages
from flow.runtime.errors import CONTINUES, cli_main, error_context, items_in_context
from flow.runtime.output_dir import check_same_settings, write_missing
from flow.sampling import images
from flow.sampling.generate import index_batches, shard
from flow.sampling.images import psnr, to_uint8
from flow.training.checks import check_encodable, check_same_data
from models import autoencoder
from models.autoencoder import VAE

EXAMPLES = """\
  python -m scripts.cache_latents --vae runs/mnist_vae/autoencoder --save_dir data/mnist64_latents \\
      data.name=folder data.args='{path: data/mnist64, channels: 1}' --check 1000 --feature_extractor mnist
  accelerate-launch --multi_gpu --num_processes 8 -m scripts.cache_latents --vae stabilityai/sd-vae-ft-mse \\
      --save_dir data/celebahq_latents data.name=folder data.args='{path: data/celebahq, size: 256}' -mp auto"""
SHOWN = 32  # pairs of the picture of --check


def parse_args():
    parser = cli.Parser(__doc__, EXAMPLES)
    flags.add_config_flag(parser, "its data section names the images")
    parser.add_argument("--vae", required=True, metavar="FOLDER|ID", help="AutoencoderKL: a folder, or owner/name on the hub")
    flags.add_output_flag(parser, "--save_dir")
    parser.add_argument("--flipped", choices=("yes", "no"), default="yes", help="also encode mirror images (default: yes)")
    flags.add_batch_size_flag(parser, 32)
    flags.add_count_flag(parser, "--shard_images", "images per file", 1024)
    flags.add_count_flag(parser, "--check", "decode N latents and compare with their images, also by features", least=2)
    flags.add_feature_flags(parser)
    flags.add_precision_flag(parser)
    args = parser.parse()
    if not args.check:
        names = ("feature_extractor", "feature_layer", "feature_weights", "allow_remote_code")
        args.refuse_typed(names, "is for --check N, which compares images by their features; add it")
    return args


def main() -> None:
    args = parse_args()
    source = data_section(args)
    accelerator = distributed.build_accelerator(distributed.resolve_precision(args.mixed_precision))
    with error_context("data"):
        data = distributed.main_process_first(accelerator, DataSpec.of(source).build)
    check_same_data(accelerator, source.name, data)
    check_encodable(source.name, data)
    for note in data.notes:
        accelerator.print(f"note: {note}")
    with error_context("--vae"):
        vae = distributed.main_process_first(accelerator, lambda: autoencoder.load(args.vae)).to(accelerator.device)
        latent_shape = vae.latent_shape(data.image_shape)
    extractor = check_extractor(args, accelerator, data) if args.check else None  # before hours of encoding
    with lock.folder(args.save_dir, accelerator):
        num_encoded = cache(args, accelerator, source, data, vae, latent_shape)
        if extractor:
            check(args, accelerator, data, extractor)
    train = train_command(args.save_dir, data, latent_shape)
    result = f"latents of {len(data)} images in {args.save_dir}, {num_encoded} of them new"
    accelerator.print(messages.summary(result, args.start, f"train on them with: {train}"))


def data_section(args) -> schema.DataConfig:
    """The section `data` of a configuration, also of an autoencoder's. Raises UserError for overrides of other sections."""
    if others := [key for key in loading.overridden(args.overrides) if not key.startswith("data.")]:
        raise UserError(f"{others[0]}: of the configuration only data.* has a meaning here; the autoencoder is --vae")
    kind: type = schema.Config
    with suppress(Exception):  # of a file that is no YAML, which loading names
        kind = VaeConfig if args.config and "autoencoder" in OmegaConf.load(args.config) else kind
    return loading.load(args.config, args.overrides, kind=kind).data


def cache(
    args, accelerator: Accelerator, source: schema.DataConfig, data: DataSet, vae: VAE, latent_shape: tuple[int, int, int]
) -> int:
    """Write the shards that are missing or damaged, then the manifest. The number of images that were encoded."""
    settings = distributed.decided_by_main(lambda: settings_of(args, accelerator, data, vae, latent_shape))
    cuts = index_batches(range(len(data)), args.shard_images)
    plan = {args.save_dir / f"latents_{i:05d}.safetensors": cut for i, cut in enumerate(cuts)}
    if accelerator.is_main_process:
        check_output_dir(args.save_dir, settings)
    accelerator.wait_for_everyone()

    def write(path: Path, cut: range, bar) -> None:
        write_shard(accelerator, args, vae, data, path, cut, settings, bar)

    num_encoded = write_missing(accelerator, plan, verify_shard, write, "encoding (images of this process)")
    if accelerator.is_main_process:
        write_manifest(args, source, data, settings, plan)
    accelerator.wait_for_everyone()
    return num_encoded


def train_command(save_dir: Path, data: DataSet, latent_shape: tuple[int, int, int]) -> str:
    """The command that trains a small transformer on the latents."""
    overrides = {"data.args.path": str(save_dir), "model.args.num_classes": schema.AUTO}
    if data.labels is None or len(data.class_names) < 2:
        overrides["preview.guidance_scale"] = 1
    if latent_shape[1] % 2 or latent_shape[2] % 2:
        overrides["model.args.patch"] = 1
    folder = files.free_folder(save_dir.with_name(f"{save_dir.name}_dit"))
    config = commands.shipped("mnist_latent_dit.yaml")
    return commands.command("train.py", "-c", config, "-e", folder, *(commands.override(k, v) for k, v in overrides.items()))


def settings_of(args, accelerator: Accelerator, data: DataSet, vae: VAE, latent_shape: tuple[int, int, int]) -> dict[str, Any]:
    """The settings that determine every shard, which are part of its header."""
    settings = {
        "autoencoder": vae.digest,
        "images": data.fingerprint(),
        "labels": None if data.labels is None else hashlib.sha256(data.labels.numpy().tobytes()).hexdigest(),
        "class_names": data.class_names,
        "count": len(data),
        "image_shape": data.image_shape,
        "latent_shape": latent_shape,
        "flipped": args.flipped,
        "bspp": args.bspp,
        "shard_images": args.shard_images,
        "mixed_precision": accelerator.mixed_precision,
    }
    return json.loads(json.dumps(settings))


def check_output_dir(save_dir: Path, settings: dict[str, Any]) -> None:
    """Check that the shards in the folder, if any, are of the same latents.

    Raises:
        UserError: for a folder of another run.
    """
    existing = stored_settings(save_dir, "latents_*.safetensors")
    check_same_settings(save_dir, existing, settings, "latents", "cache_latents")


def write_shard(
    accelerator: Accelerator, args, vae: VAE, data: DataSet, path: Path, cut: range, settings: dict[str, Any], bar
) -> None:
    """Encode the images `cut` and write them as one file."""
    parts: dict[str, list[Tensor]] = {}
    for batch, pixels in items_in_context("data", reading.read_batches(data, index_batches(cut, args.bspp))):
        x = to_float(pixels.to(accelerator.device))
        for suffix, shown in {"": x, "_flipped": x.flip(-1)}.items() if args.flipped == "yes" else [("", x)]:
            with accelerator.autocast():
                mean, std = vae.encode(shown)
            parts.setdefault(f"mean{suffix}", []).append(mean.half().cpu())
            parts.setdefault(f"std{suffix}", []).append(std.half().cpu())
        bar.update(len(batch))
    tensors = {key: torch.cat(value) for key, value in parts.items()}
    if not all(bool(tensor.isfinite().all()) for tensor in tensors.values()):
        raise UserError(f"--vae {args.vae}: latents of images {cut.start} to {cut.stop - 1} are not finite; use -mp no")
    header = {"settings": settings, "sums": sums_of(tensors)}
    if data.labels is not None:
        tensors["labels"] = data.labels[cut.start : cut.stop].clone()
    with files.atomic_file(path) as temporary:
        save_shard(temporary, tensors, header)


def sums_of(tensors: dict[str, Tensor]) -> list[list[float]]:
    """For each channel the sums over images and pixels of E[z] and E[z^2] = mean^2 + std^2, in float64: [2, c]."""
    first = second = torch.zeros((), dtype=torch.float64)
    for name in [name for name in tensors if name.startswith("mean")]:
        mean, std = tensors[name].double(), tensors[name.replace("mean", "std")].double()
        first = first + mean.sum((0, 2, 3))
        second = second + (mean.square() + std.square()).sum((0, 2, 3))
    return [first.tolist(), second.tolist()]


def write_manifest(args, source: schema.DataConfig, data: DataSet, settings: dict[str, Any], plan: dict[Path, range]) -> None:
    """manifest.json, last of all, with mean (shift) and standard deviation (scale) of each channel over the data set.

    The sums of the shards are added by math.fsum, whose result does not depend on their order.
    """
    listed, headers = list_shards(args.save_dir, (path.name for path in plan))
    sums = [header["sums"] for header in headers]
    _, height, width = settings["latent_shape"]
    n = len(data) * height * width * (2 if args.flipped == "yes" else 1)
    first, second = ([math.fsum(column) / n for column in zip(*(s[i] for s in sums), strict=True)] for i in (0, 1))
    scale = [math.sqrt(max(b - a * a, 0.0)) for a, b in zip(first, second, strict=True)]
    if not all(scale):
        raise UserError(f"--vae {args.vae}: channel {scale.index(0.0)} of its latents is the same number everywhere")
    manifest = {
        **settings,
        "codec": {
            "name": "vae", "source": args.vae, "digest": settings["autoencoder"], "shift": first, "scale": scale,
            "image_shape": settings["image_shape"],
        },
        "data": asdict(DataSpec.of(source)),
        **listed,
    }  # fmt: skip
    files.write_text(args.save_dir / MANIFEST, json.dumps(manifest, indent=1))


def check_extractor(args, accelerator: Accelerator, data: DataSet) -> Extractor:
    """The feature extractor of --check. Raises UserError for one that is not there or does not take these images."""
    with error_context("--check"):
        if len(data) < 2:
            raise ValueError("needs at least 2 images, the data set has 1")
        extractor = distributed.main_process_first(
            accelerator,
            lambda: Extractor(
                args.feature_extractor, args.feature_layer, args.feature_weights, accelerator.device, args.allow_remote_code
            ),
        )
        extractor.dimension(data.image_shape)
    return extractor


def check(args, accelerator: Accelerator, data: DataSet, extractor: Extractor) -> None:
    """Write reconstructions.png and reconstructions.json: the means of the posteriors, decoded, against their images."""
    with error_context("--check"):
        latents = datasets.build("latents", None, {"path": str(args.save_dir)})
        codec = autoencoder.build_codec(latents.codec)
    count = min(args.check, len(data))
    image_indices = generator("check").permutation(len(data))[:count].tolist()  # folders are sorted by class
    local_batches = shard(accelerator, range(count), args.bspp)
    real_features = FeatureSet()
    recon_features = FeatureSet()
    ratios = []
    shown = None
    with distributed.progress(accelerator, sum(map(len, local_batches)), "reconstructions (of this process)") as bar:
        index_lists = [[image_indices[k] for k in batch] for batch in local_batches]
        read = items_in_context("data", reading.read_batches(data, index_lists))
        for batch, (indices, real) in zip(local_batches, read, strict=True):
            mean, _ = latents.moments(indices)
            with accelerator.autocast():
                recon = to_uint8(codec.decode(latents.normalised(mean.float().to(accelerator.device)))).cpu()
            real_features.add(extractor.layer, batch, extractor(real))
            recon_features.add(extractor.layer, batch, extractor(recon))
            ratios += psnr(real, recon).tolist()
            shown = shown or (real[:SHOWN], recon[:SHOWN])
            bar.update(len(batch))
    everything = distributed.gather_to_main(accelerator, (ratios, real_features, recon_features))
    if everything is None:
        return
    decibels = torch.tensor([ratio for part, _, _ in everything for ratio in part])
    real, recon = (merge([part[i] for part in everything]) for i in (1, 2))
    if count <= (dimension := len(real.moments.mu)):
        print(f"warning: {too_few_images_message(count, '--check', dimension)}")
    distance = frechet_distance(real.moments, recon.moments)
    error = mean_standard_error(decibels.numpy())
    result = {
        "images": count, "PSNR": round(decibels.mean().item(), 3), "PSNR_error": error and round(error, 3),
        f"r{extractor.distance_name}": round(distance, 4),
    }  # fmt: skip
    files.write_text(args.save_dir / "reconstructions.json", json.dumps(result, indent=1))
    images.write_png(args.save_dir / "reconstructions.png", images.side_by_side_grid(*shown))
    spread = "" if error is None else f" ± {error:.2f}"
    print(
        f"PSNR {decibels.mean():.2f}{spread} dB, r{extractor.distance_name} {distance:.3f} over "
        f"{count} images, shown in {args.save_dir / 'reconstructions.png'}"
    )


if __name__ == "__main__":
    cli_main(main, CONTINUES)
