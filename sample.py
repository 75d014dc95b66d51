"""Sample images from trained weights: `accelerate-launch sample.py --weights runs/mnist --n_samples 100 --save_dir samples`.

Image k depends on the weights, the settings and k, not on the number of processes (with methods that have tolerances a
little on its batch, so --bspp must stay the same). A run that was cut off goes on where it was. `--save_dir` gets images/
(PNG), grid.png, sampling.json and, with --npz, samples.npz.
"""

import dataclasses
import json
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator

from configs import schema
from configs.schema import UserError
from flow.model import FlowModel
from flow.runtime import cli, distributed, files, lock
from flow.runtime.errors import cli_main, error_context
from flow.sampling import grid_store, images, snapshot
from flow.sampling.conditions import labels_for
from flow.sampling.generate import NFECounter, generate, shard
from flow.sampling.settings import SamplerSettings, validate
from flow.solvers import HAS_TOLERANCES, SOLVERS

EXAMPLES = """\
  accelerate-launch sample.py --weights runs/mnist --n_samples 100 --save_dir samples/mnist --sampling_steps 50
  accelerate-launch sample.py --weights runs/digits --n_samples 40 --save_dir samples/threes --labels 3 --guidance_scale 2
  accelerate-launch sample.py --weights runs/mnist_text --n_samples 20 --save_dir samples/prompts --guidance_scale 3 \\
      --prompts "a handwritten three" "数字7"
  accelerate-launch --multi_gpu --num_processes 8 sample.py --weights runs/cifar10 --n_samples 50000 --save_dir samples/50k \\
      --sampling_method heun --sampling_steps 18 --bspp 500 -mp bf16"""
GRID_IMAGES = 100  # at most


def parse_args():
    parser = cli.Parser(__doc__, EXAMPLES)
    parser.add_argument("-c", "--config", metavar="YAML", help="configuration; default: the one inside the weights")
    parser.add_argument("--weights", required=True, metavar="PATH", help="run folder, checkpoint folder or .safetensors")
    parser.add_argument("--n_samples", type=cli.at_least(1), required=True, help="number of images")
    parser.add_argument("--save_dir", type=Path, required=True, metavar="DIR", help="output folder")
    parser.add_argument("--sampling_method", choices=SOLVERS, default="euler", help="solver (default: euler)")
    cli.add_step_flags(parser, [100], several=False)
    cli.add_solver_flags(parser)
    parser.add_argument("--bspp", type=cli.at_least(1), default=100, help="batch size per process (default: 100)")
    parser.add_argument("--seed", type=cli.at_least(0), default=8888, help="seed of the noise (default: 8888)")
    parser.add_argument(
        "--labels", nargs="+", metavar="CLASS", help="classes by name or number, one image after the other (default: all)"
    )
    parser.add_argument("--prompts", nargs="+", metavar="TEXT", help="for networks with text, one image after the other")
    parser.add_argument("--guidance_scale", type=cli.guidance_scale, default=1.0, help="v_u + w (v_c - v_u) (default: 1, off)")
    parser.add_argument("-mp", "--mixed_precision", choices=schema.MIXED_PRECISIONS, default="no")
    parser.add_argument("--compile", action="store_true", help="torch.compile the network, which pays on GPUs")
    parser.add_argument("--grid_by_class", action="store_true", help="grid.png: a row, not a column, for each class or prompt")
    parser.add_argument("--npz", action="store_true", help="also write samples.npz: arr_0 [N, H, W, C], labels [N]")
    return parser.parse()


def main() -> None:
    args = parse_args()
    snap = snapshot.load(args.weights, args.config, args.overrides)
    model = snap.model()
    net = model.net
    labels = cli.labels_of(args.labels, snap.class_names)
    prompts = tuple(args.prompts) if args.prompts else None
    method = args.sampling_method
    [steps] = cli.num_steps(args, method)
    settings = SamplerSettings(
        method, steps, args.guidance_scale, args.seed, labels, prompts, args.time_grid,
        grid_store.load(snap.path, method, steps) if args.time_grid == "optimized" else None,
        cli.solver_options(args, method, [method]),
    )  # fmt: skip
    with error_context("sample"):
        validate(settings, net)
        if args.grid_by_class and not (settings.prompts or net.num_classes):
            raise ValueError("--grid_by_class: this network was trained without labels (model.args.num_classes)")
    accelerator = distributed.build_accelerator(args.mixed_precision)
    with lock.folder(args.save_dir, accelerator):
        sample(args, accelerator, snap, model, settings)


def sample(
    args, accelerator: Accelerator, snap: snapshot.Snapshot, model: FlowModel, settings: SamplerSettings
) -> None:  # fmt: skip
    """Write the images and their grid, or the points."""
    net = model.net
    folder = args.save_dir / "images"
    if accelerator.is_main_process:
        claim(args, snap, settings, net.num_classes)
        if len(snap.image_shape) == 3:
            folder.mkdir(exist_ok=True)
    accelerator.wait_for_everyone()

    distributed.prepare_model(net, accelerator, args.compile)
    indices = range(args.n_samples)
    mine = shard(accelerator, indices, args.bspp)
    if len(snap.image_shape) == 1:
        sample_points(args, accelerator, model, snap.image_shape, mine, settings)
        return
    bar = distributed.progress(accelerator, sum(map(len, mine)), "sampling (images of this process)")
    writing: deque[Future] = deque()

    def finished(batch: range) -> bool:
        done = all((f := png(folder, k)).is_file() and f.stat().st_size for k in batch)
        bar.update(len(batch) if done else 0)
        return done

    generated = generate(accelerator, model, snap.image_shape, (b for b in mine if not finished(b)), settings)
    cost = NFECounter()
    with ThreadPoolExecutor(max_workers=4) as pool:  # encodes while the next batch is computed
        for result in generated:
            for k, image in zip(result.indices, result.images, strict=True):
                writing.append(pool.submit(images.write_png, png(folder, k), image))
            while len(writing) > 4 * args.bspp:  # so that memory stays the same for any number of images
                writing.popleft().result()
            bar.update(len(result.indices))
            cost.add(result)
        while writing:
            writing.popleft().result()
    bar.close()
    nfe, forwards = cost.mean(accelerator)
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        files.clean_temporaries(folder)
        shown = torch.stack([torch.from_numpy(images.read_png(png(folder, k))) for k in indices[:GRID_IMAGES]])
        cycle = len(settings.prompts or settings.labels or range(net.num_classes or 0))
        one_each = args.grid_by_class or 2 <= cycle <= 20  # a column for each label or prompt, if they are few
        names = names_of(settings, snap, net.num_classes) if one_each else []
        picture = images.labelled_grid(shown.permute(0, 3, 1, 2), cycle if one_each else 10, names, args.grid_by_class)
        images.write_png(args.save_dir / "grid.png", picture)
        for line in images.margin_names(names)[1]:
            print(f"in grid.png: {line}")
        if args.npz:
            write_npz(args.save_dir / "samples.npz", folder, indices, settings, net.num_classes)
    told = f", NFE {nfe} ({forwards} network evaluations) an image" if nfe else ", all of which were there already"
    accelerator.print(f"{args.n_samples} images in {folder}{told}; look at {args.save_dir / 'grid.png'}")


def sample_points(
    args, accelerator: Accelerator, model: FlowModel, shape: tuple[int, ...], mine: list[range], settings: SamplerSettings
) -> None:
    """Points are no files of their own: samples.npz with arr_0 float32 [N, 2] (and labels), grid.png is their cloud."""
    found, cost = [], NFECounter()
    with distributed.progress(accelerator, sum(map(len, mine)), "sampling (points of this process)") as bar:
        for result in generate(accelerator, model, shape, mine, settings):
            found.append((result.indices.start, result.images))
            cost.add(result)
            bar.update(len(result.indices))
    nfe, _ = cost.mean(accelerator)
    parts = distributed.gather_to_main(accelerator, found)
    if parts is not None:
        ordered = sorted((item for part in parts for item in part), key=lambda item: item[0])
        points = torch.cat([made for _, made in ordered])
        arrays = {"arr_0": points.numpy()}
        labels = labels_for(range(args.n_samples), settings, model.net.num_classes)
        if labels is not None:
            arrays["labels"] = labels.numpy()
        with files.atomic_file(args.save_dir / "samples.npz") as temporary, open(temporary, "wb") as file:
            np.savez(file, **arrays)
        images.write_png(args.save_dir / "grid.png", images.scatter_image(points))
        print(f"{args.n_samples} points in {args.save_dir / 'samples.npz'}, NFE {nfe}; look at grid.png there")


def names_of(settings: SamplerSettings, snap: snapshot.Snapshot, num_classes: int | None) -> list[str]:
    """What stands beside the images of each prompt or label: the prompt, or the name of the class or else its number."""
    if settings.prompts:
        return list(settings.prompts)
    names = getattr(snap, "class_names", None) or ()
    return [names[k] if k < len(names) else str(k) for k in settings.labels or range(num_classes or 0)]


def png(folder: Path, index: int) -> Path:
    return folder / f"{index:06d}.png"


def claim(args, snap: snapshot.Snapshot, settings: SamplerSettings, num_classes: int | None) -> None:
    """Write sampling.json, or check that the one there is of the same images; nothing of another run is overwritten."""
    mine = {
        "weights_sha256": files.sha256(snap.path),
        **dataclasses.asdict(settings),
        "num_classes": num_classes,
        "mixed_precision": args.mixed_precision,
        "image_shape": snap.decoded_shape,
        **({"bspp": args.bspp} if settings.method in HAS_TOLERANCES else {}),
    }
    mine = json.loads(json.dumps(mine))
    save_dir = args.save_dir
    path = save_dir / "sampling.json"
    if path.is_file():
        with error_context(f"{path}: is damaged; name another folder with --save_dir"):
            theirs = json.loads(path.read_text(encoding="utf-8"))
            if not isinstance(theirs, dict):
                raise ValueError("it holds no settings")
        for key, value in mine.items():
            if theirs.get(key) != value:
                raise UserError(
                    f"--save_dir {save_dir}: holds images of another run ({key} {theirs.get(key)}, now {value}); "
                    "name another folder"
                )
    elif save_dir.exists() and not files.is_empty_dir(save_dir):
        raise UserError(f"--save_dir {save_dir}: exists and was not written by sample.py; name another folder")
    else:
        files.write_text(path, json.dumps(mine, indent=1))
    files.clean_temporaries(save_dir)


def write_npz(path: Path, folder: Path, indices: range, settings: SamplerSettings, num_classes: int | None) -> None:
    """arr_0 uint8 [N, H, W, C], the layout that evaluation suites read, and labels int64 [N] where there are any."""
    labels = labels_for(indices, settings, num_classes)
    arrays = {"arr_0": np.stack([images.read_png(png(folder, k)) for k in indices])}
    if labels is not None:
        arrays["labels"] = labels.numpy()
    with files.atomic_file(path) as temporary, open(temporary, "wb") as file:
        np.savez(file, **arrays)


if __name__ == "__main__":
    cli_main(main)
