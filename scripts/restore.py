"""Restore images with a trained flow: `python -m scripts.restore --weights runs/mnist --task inpaint --save_dir restored`.

Images that were held out of the training, or those of --images, are degraded and restored by PnP-Flow, which needs no training
(flow/restoration.py). Their PSNR and SSIM are compared with those of simple methods. `--save_dir` gets images/ (PNG),
restore.json, restore.md and restore.png: originals, degraded images, the best simple method, the flow.
"""

import dataclasses
import hashlib
import json
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from configs.errors import UserError
from datasets import DataSpec, reading
from datasets.encoded import read_image
from datasets.images import to_float
from flow.evaluation import restoration as scoring
from flow.guidance import GuidedVelocity
from flow.model import FlowModel
from flow.noise import gaussian_noise
from flow.restoration import (
    TASKS,
    Degradation,
    Downsampling,
    GaussianBlur,
    Grayscale,
    Inpainting,
    RestorationSettings,
    box_mask,
    measure,
    random_masks,
    restore,
)  # fmt: skip
from flow.runtime import cli, commands, distributed, files, flags, lock, messages
from flow.runtime.errors import CONTINUES, cli_main, error_context, items_in_context
from flow.runtime.output_dir import check_same_settings
from flow.sampling import images, named_data, snapshot
from flow.sampling.generate import build_velocity, check_finite, index_batches, shard, to_solver_dtype
from flow.sampling.settings import SamplerSettings, validate
from flow.source import GAUSSIAN

EXAMPLES = """\
  python -m scripts.restore --weights runs/mnist --task inpaint --mask_box 12 --save_dir restored/box
  python -m scripts.restore --weights runs/mnist --task super_resolution --factor 4 --save_dir restored/large
  python -m scripts.restore --weights runs/cifar10 --task colorize --images photos --save_dir restored/colors"""
TASK_FLAGS = {
    "mask": "inpaint", "mask_box": "inpaint", "mask_fraction": "inpaint", "factor": "super_resolution", "blur": "deblur",
}  # fmt: skip
DEFAULTS = {"mask_fraction": 0.7, "factor": 4, "blur": 2.0}
SHOWN = 10  # images of restore.png


def parse_args():
    parser = cli.Parser(__doc__, EXAMPLES)
    flags.add_weights_flag(parser)
    parser.add_argument("--task", choices=TASKS, required=True, help="what was done to the images")
    flags.add_output_flag(parser, "--save_dir")
    flags.add_count_flag(parser, "--n_images", "the first of the data set or folder", 100)
    parser.add_argument("--images", metavar="DIR|NAME", help="images to degrade (default: held out of the training)")
    parser.add_argument("--noise", type=flags.nonnegative, default=0.05, metavar="STD", help="of the degraded images, whose "
                        "pixels are in [-1, 1] (default: 0.05)")  # fmt: skip
    missing = parser.add_mutually_exclusive_group()
    missing.add_argument("--mask", type=Path, metavar="PNG", help="inpaint: white pixels are missing")
    missing.add_argument("--mask_box", type=flags.at_least(1), metavar="SIZE", help="inpaint: side of a centered square")
    missing.add_argument(
        "--mask_fraction", type=flags.fraction, metavar="X", help="inpaint: share of random pixels (default: 0.7)"
    )
    parser.add_argument("--factor", type=flags.at_least(2), metavar="N", help="super_resolution (default: 4)")
    parser.add_argument("--blur", type=flags.positive, metavar="SIGMA", help="deblur: of the Gaussian, in pixels (default: 2)")
    flags.add_count_flag(parser, "--steps", "of t, from 0 to 1", 100)
    flags.add_count_flag(parser, "--draws", "of noise in each step, in pairs of opposite signs", 2)
    parser.add_argument(
        "--step_size", type=flags.positive, metavar="X", help="of gradient steps at most, below 2 (default: 1.9)"
    )
    flags.add_count_flag(parser, "--data_steps", "gradient steps at each time (default: 16 for deblur, else 1)")
    flags.add_batch_size_flag(parser)
    flags.add_seed_flag(parser, use="noise and random masks")
    flags.add_labels_flag(parser, "none, the velocity without labels")
    flags.add_prompts_flag(parser)
    flags.add_guidance_flag(parser)
    flags.add_precision_flag(parser)
    return parser.parse()


def main() -> None:
    args = parse_args()
    accelerator = distributed.build_accelerator(args.mixed_precision)  # first: processes agree on a revision of the hub
    snap = snapshot.load(args.weights, None, args.overrides)
    distributed.check_same(accelerator, snap.sha256, f"--weights {args.weights}")
    if not snap.space.is_pixels:
        raise UserError(f"--weights {args.weights}: a flow of {snap.space.kind}; only flows of pixels restore images")
    build_degradation = degradation_of(args, snap.image_shape)
    model = snap.model()
    if model.source.name != GAUSSIAN:
        raise UserError(
            f"--weights {args.weights}: flow.source.name={model.source.name}; only flows from Gaussian noise restore images"
        )
    labels = flags.labels_of(args.labels, snap.class_names)
    prompts = tuple(args.prompts) if args.prompts else None
    conditions = SamplerSettings("euler", 1, args.guidance_scale, seed=args.seed, labels=labels, prompts=prompts)
    with args.naming_flags("restore"):
        validate(conditions, model)
        check_conditions(conditions, model, snap)
        settings = settings_of(args)
    name, originals = load_images(args, snap, accelerator)
    digest = hashlib.sha256(originals.numpy().tobytes()).hexdigest()
    distributed.check_same(accelerator, digest, "--images")
    record = {
        "weights_sha256": snap.sha256, "task": args.task, "degradation": parameters(args), "noise": args.noise,
        "images": name, "images_sha256": digest,
        **dataclasses.asdict(settings), "labels": labels, "prompts": args.prompts, "guidance_scale": args.guidance_scale,
        "seed": args.seed, "mixed_precision": accelerator.mixed_precision, **snapshot.network_record(snap.config),
    }  # fmt: skip
    record = json.loads(json.dumps(record))
    with lock.folder(args.save_dir, accelerator):
        if accelerator.is_main_process:
            check_output_dir(args.save_dir, record)
        is_done = accelerator.is_main_process and is_complete(args.save_dir, tuple(originals.shape))
        if not distributed.any_process(accelerator, is_done):
            distributed.prepare_model(model.net, accelerator)
            model.eval()
            parts = restore_images(args, accelerator, model, originals, build_degradation, conditions, settings)
            if parts is not None:
                others = simple_methods(accelerator, parts[0], originals, build_degradation)
                write_results(args.save_dir, record, originals, parts, others, build_degradation(range(len(originals))))
        if accelerator.is_main_process:
            print_summary(args)


def degradation_of(args, shape: tuple[int, ...]):
    """What gives the degradation of the images with the given indices. Raises UserError for flags that do not fit."""
    channels, height, width = shape
    for flag, task in TASK_FLAGS.items():
        if getattr(args, flag) is not None and task != args.task:
            raise UserError(f"--{flag}: is for --task {task}, not for {args.task}")
    if args.task == "colorize":
        if channels != 3:
            raise UserError(f"--task colorize: needs a flow of images with 3 channels, this one has {channels}")
        return lambda indices: Grayscale()
    if args.task == "deblur":
        blur = GaussianBlur(value_of(args, "blur"))
        if blur.sigma > min(height, width):
            raise UserError(f"--blur {blur.sigma:g}: must be at most the side of the images, {min(height, width)} pixels")
        return lambda indices: blur
    if args.task == "super_resolution":
        factor = value_of(args, "factor")
        if height % factor or width % factor:
            raise UserError(f"--factor {factor}: {height}x{width} pixels must be divisible by it")
        return lambda indices: Downsampling(factor)
    if args.mask:
        known = read_mask(args.mask, height, width)
        return lambda indices: Inpainting(known)
    if args.mask_box:
        with error_context("--mask_box"):
            known = box_mask(height, width, args.mask_box)
        return lambda indices: Inpainting(known)
    share = value_of(args, "mask_fraction")
    with error_context("--mask_fraction"):
        random_masks(height, width, share, args.seed, range(1))
    return lambda indices: Inpainting(random_masks(height, width, share, args.seed, indices))


def read_mask(path: Path, height: int, width: int) -> Tensor:
    """[1, 1, H, W], 1 for known pixels, the black ones. Raises UserError for a mask that does not fit."""
    try:
        white = read_image(path, None, 1) >= 128
    except Exception as error:  # Pillow raises a dozen kinds for a broken file
        raise UserError(f"--mask {path}: not a readable image ({error})") from None
    if white.shape[1:] != (height, width):
        raise UserError(f"--mask {path}: has {white.shape[1]}x{white.shape[2]} pixels, the images have {height}x{width}")
    if white.all() or not white.any():
        raise UserError(f"--mask {path}: must have white pixels, which are missing, and black ones, which are known")
    return (~white)[None].float()


def parameters(args) -> dict[str, Any]:
    """The parameters of the degradation, for the record."""
    if args.task != "inpaint":
        return {flag: value_of(args, flag) for flag, task in TASK_FLAGS.items() if task == args.task}
    if args.mask:
        return {"mask_sha256": files.sha256(args.mask)}
    return {"mask_box": args.mask_box} if args.mask_box else {"mask_fraction": value_of(args, "mask_fraction")}


def value_of(args, flag: str) -> float:
    """What was typed, else the default, which is not argparse's, as a flag of another task is refused."""
    typed = getattr(args, flag)
    return DEFAULTS[flag] if typed is None else typed


def check_conditions(conditions: SamplerSettings, model: FlowModel, snap: snapshot.Snapshot) -> None:
    """Raises ValueError where labels are needed, for guidance or as the network knows no images without them."""
    if model.net.num_classes is None or conditions.labels or model.net.max_prompt_bytes:
        return
    if conditions.guidance_scale != 1:
        raise ValueError(f"guidance_scale={conditions.guidance_scale:g}: needs --labels")
    if not snap.config.flow.label_dropout:
        raise ValueError("labels: this network was trained with labels alone (flow.label_dropout=0): give some with --labels")


def settings_of(args) -> RestorationSettings:
    """The settings of the task, but for what the command line says. Raises ValueError for numbers out of range."""
    typed = {name: getattr(args, name) for name in ("step_size", "data_steps") if getattr(args, name) is not None}
    return dataclasses.replace(TASKS[args.task], steps=args.steps, draws=args.draws, **typed)


def load_images(args, snap: snapshot.Snapshot, accelerator: Accelerator) -> tuple[str, Tensor]:
    """(what they are called, the first images uint8 [N, C, H, W]) of --images, else held out of the training."""
    if args.images:
        with error_context("--images"):
            name, spec = args.images, named_data.spec_of(args.images, snap.config.data.root, snap.image_shape)
    else:
        snap.check_data()
        with error_context("data"):
            spec = DataSpec.of(snap.config.data).behind()
            held_out = spec.held_out()
        name = f"{spec.name}, {held_out.title if held_out else 'training images'}"
        spec = held_out.spec if held_out else spec
        if not held_out:
            accelerator.print(
                "note: this data set has no held-out part: these are images of the training (--images takes others)"
            )
    flag = "--images" if args.images else "data"
    with error_context(flag):
        data = distributed.main_process_first(accelerator, spec.build)
    if tuple(data.image_shape) != snap.image_shape:
        raise UserError(f"{flag}: {name} has images of {list(data.image_shape)}, the flow {list(snap.image_shape)}")
    if args.n_images > len(data):
        if not args.images:
            raise UserError(f"--n_images {args.n_images}: {name} has {len(data)}; use at most {len(data)}")
        accelerator.print(f"note: {name} has {len(data)} images")
    batches = index_batches(range(min(args.n_images, len(data))), 100)
    return name, torch.cat([batch for _, batch in items_in_context("data", reading.read_batches(data, batches))])


def check_output_dir(folder: Path, record: dict) -> None:
    """Write restore.json, or check that the existing one is of the same images. Raises UserError where it is not."""
    path = folder / "restore.json"
    existing = None
    if path.is_file():
        older = {key: record[key] for key in ("flow", "model")}  # which folders of earlier versions do not have
        existing = [older | read_record(path)["settings"]]
    check_same_settings(folder, existing, record, "images", "scripts.restore")
    if existing is None:
        files.write_text(path, json.dumps({"settings": record}, indent=1))


def read_record(path: Path) -> dict[str, Any]:
    """restore.json: settings and, once all is written, scores. Raises UserError for a damaged one."""
    with error_context(f"{path}: is damaged; name another folder with --save_dir"):
        record = files.read_json(path)
        if not isinstance(record, dict) or not isinstance(record.get("settings"), dict):
            raise ValueError("it has no settings")
        try:
            record["scores"] = [scoring.Scores(**entry) for entry in record.get("scores", [])]
        except TypeError:
            raise ValueError("scores holds something else") from None
    return record


def is_complete(folder: Path, shape: tuple[int, ...]) -> bool:
    """Whether all that `write_results` writes is there, with images of a shape (N, C, H, W)."""
    restored = (images.png_path(folder / "images", k) for k in range(shape[0]))
    tables = bool(read_record(folder / "restore.json")["scores"]) and (folder / "restore.md").is_file()
    return tables and images.is_whole_png(folder / "restore.png") and all(images.is_whole_png(p, shape[1:]) for p in restored)


def restore_images(
    args, accelerator: Accelerator, model: FlowModel, originals: Tensor, build_degradation, conditions: SamplerSettings,
    settings: RestorationSettings,
) -> tuple[Tensor, Tensor] | None:  # fmt: skip
    """(measurements, restored images uint8 [N, C, H, W]) of all processes on the main one, None on the others."""
    parts = []
    shape = tuple(originals.shape[1:])
    batches = shard(accelerator, range(len(originals)), args.bspp)
    total = sum(map(len, batches)) * settings.steps
    with (
        distributed.progress(accelerator, total, "restoration (images x steps of this process)") as bar,
        torch.inference_mode(),
    ):
        for indices in batches:
            degradation = to_device(build_degradation(indices), accelerator.device)
            x1 = to_solver_dtype(to_float(originals[indices.start : indices.stop]), accelerator.device)
            y = measure(x1, degradation, args.noise, args.seed, indices)
            velocity = velocity_of(model, indices, conditions, accelerator.device)
            noise = partial(noise_of, args.seed, indices, shape)
            with accelerator.autocast():
                x = restore(velocity, y, degradation, noise, settings, args.noise, partial(bar.update, len(indices)))
            check_finite(x, indices)
            parts.append((indices.start, (y.cpu(), images.to_uint8(x).cpu())))
    gathered = distributed.gather_in_order(accelerator, parts)
    if gathered is None:
        return None
    measured, restored = zip(*gathered, strict=True)
    return torch.cat(measured), torch.cat(restored)


def velocity_of(model: FlowModel, indices: range, conditions: SamplerSettings, device: torch.device) -> GuidedVelocity:
    """The velocity of these images: with the labels or prompts of the command line, else that without a label."""
    if model.net.num_classes is None or conditions.labels or conditions.prompts:
        return build_velocity(model, indices, conditions, device)
    assert model.net.null is not None
    return GuidedVelocity(model, torch.full((len(indices),), model.net.null, device=device), model.net.null)


def noise_of(seed: int, indices: range, shape: tuple[int, ...], step: int, draw: int) -> Tensor:
    """Standard normal noise [b, *shape] of a step; a function of (seed, image, step, draw)."""
    return gaussian_noise(f"restoration step {step} draw {draw}", seed, indices, shape)


def to_device(degradation: Degradation, device: torch.device) -> Degradation:
    """The degradation with its mask, if any, on the device."""
    return Inpainting(degradation.known.to(device)) if isinstance(degradation, Inpainting) else degradation


def simple_methods(accelerator: Accelerator, y: Tensor, originals: Tensor, build_degradation) -> dict[str, Tensor]:
    """The restorations to compare with, by name. Holes are filled image by image, as that takes as long as the flow may; other
    methods look at all images."""
    degradation = build_degradation(range(len(originals)))
    if not isinstance(degradation, Inpainting):
        return scoring.baselines(degradation, y, originals)
    filled: dict[str, list[Tensor]] = {}
    with distributed.progress(accelerator, len(originals), "simple methods (images)") as bar:
        for k in range(len(originals)):
            part = slice(k, k + 1)
            for name, image in scoring.baselines(build_degradation(range(k, k + 1)), y[part], originals[part]).items():
                filled.setdefault(name, []).append(image)
            bar.update()
    return {name: torch.cat(parts) for name, parts in filled.items()}


def write_results(
    folder: Path, record: dict, originals: Tensor, parts: tuple[Tensor, Tensor], others: dict[str, Tensor],
    degradation: Degradation,
) -> None:  # fmt: skip
    """Write the restored images, the picture, the table with the simple methods `others`, and restore.json last."""
    y, restored = parts
    degraded = images.to_uint8(degradation.to_image(y))
    with error_context("restore"):
        scores = [
            scoring.score(name, originals, candidate)
            for name, candidate in {scoring.DEGRADED: degraded, **others, scoring.FLOW: restored}.items()
        ]
    (folder / "images").mkdir(exist_ok=True)
    with images.ImageWriter(folder / "images") as writer:
        writer.write(range(len(restored)), restored)
    best = scoring.best_baseline([entry for entry in scores if entry.method in others])
    rows = {"original": originals, scoring.DEGRADED: degraded, best.method: others[best.method], scoring.FLOW: restored}
    shown = torch.stack([batch[:SHOWN] for batch in rows.values()], dim=1).flatten(0, 1)
    picture = images.labelled_grid(shown, len(rows), list(rows), transposed=True)
    images.write_png(folder / "restore.png", picture)
    files.write_text(folder / "restore.md", scoring.markdown(scores) + "\n")
    rows_of = [dataclasses.asdict(entry) for entry in scores]
    files.write_text(folder / "restore.json", json.dumps({"settings": record, "scores": rows_of}, indent=1))


def print_summary(args) -> None:
    """The table and the last line."""
    scores = read_record(args.save_dir / "restore.json")["scores"]
    print((args.save_dir / "restore.md").read_text(encoding="utf-8").rstrip())
    [flow] = [entry for entry in scores if entry.method == scoring.FLOW]
    best = scoring.best_baseline(scores)
    gain = [a - b for a, b in zip(flow.psnr, best.psnr, strict=True)]
    mean, interval = scoring.mean_and_interval(gain)
    spread = "" if interval is None else f" ± {interval:.2f}"
    result = (
        f"{len(flow.psnr)} images in {args.save_dir / 'images'} and {args.save_dir / 'restore.png'}, PSNR of {scoring.FLOW} "
        f"{mean:+.2f}{spread} dB against {best.method}"
    )
    next_task = "deblur" if args.task != "deblur" else "inpaint"
    folder = files.free_folder(args.save_dir.parent / next_task)
    command = ["-m", "scripts.restore", "--weights", args.weights, "--task", next_task, "--save_dir", folder]
    command += ["--n_images", str(len(flow.psnr))]
    command += args.typed("images", "noise", "steps", "draws", "seed", "labels", "prompts", "guidance_scale", "mixed_precision")
    line = commands.command(*command, *args.overrides)
    print(messages.summary(result, args.start, f"try another degradation with: {line}"))


if __name__ == "__main__":
    cli_main(main, CONTINUES)
