"""Tables of distance to the data against NFE: `accelerate-launch evaluate.py --weights runs/mnist --methods euler heun ...`.

One row for each method, number of steps, guidance scale and range of images. Images go from the network straight into
the feature extractor, on every process. `--samples DIR` scores a folder of images instead. `--out` gets results.jsonl,
results.csv, results.md and nfe.png; rows that are there already are not computed again.
"""

import json
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from torch import Tensor

import datasets
import models
from configs import schema
from configs.schema import Config, UserError
from datasets import captions
from flow.engine import cli, files, lock, runtime, snapshot, tuned_grids
from flow.engine.generate import Cost, SamplerSettings, check, generate, labels_of, share
from flow.engine.reading import Data, read_images
from flow.evaluation import metrics, plots, points, reference, table
from flow.evaluation.features import INCEPTION, Extractor, FeatureSet, merge
from flow.evaluation.points import PointSpace
from flow.evaluation.reference import Reference
from flow.solvers import BY_BATCH, METHODS
from flow.solvers.adaptive import ADAPTIVE

EXAMPLES = """\
  accelerate-launch evaluate.py --weights runs/mnist --feature_extractor mnist --methods euler heun --sampling_steps 5 10 50
  accelerate-launch evaluate.py --weights runs/cifar10 --methods heun --sampling_steps 18 --n_samples 50000 --repeats 3
  accelerate-launch evaluate.py --samples samples/mnist --reference mnist --feature_extractor mnist"""


def parse_args():
    parser = cli.Parser(__doc__, EXAMPLES)
    parser.add_argument("-c", "--config", metavar="YAML", help="configuration; default: the one inside the weights")
    parser.add_argument("--weights", metavar="PATH", help="run folder, checkpoint folder or .safetensors")
    parser.add_argument("--samples", type=Path, metavar="DIR", help="score this folder of images, no weights needed")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=["euler"], help="solvers (default: euler)")
    cli.add_step_flags(parser, [100], several=True)
    cli.add_solver_flags(parser)
    parser.add_argument("--guidance_scale", nargs="+", type=cli.scale, default=[1.0], help="(default: 1, off)")
    parser.add_argument("--labels", type=int, nargs="+", help="classes, one image after the other (default: all)")
    parser.add_argument(
        "--captions", choices=("plain", "held_out"), help="networks with text: one caption a class (default), or unseen ones"
    )
    parser.add_argument("--n_samples", type=cli.at_least(2), default=50_000, help="images a row (default: 50000)")
    parser.add_argument("--repeats", type=cli.at_least(1), default=1, help="image ranges a row is repeated on (default: 1)")
    parser.add_argument("--seed", type=cli.at_least(0), default=8888, help="seed of the noise (default: 8888)")
    parser.add_argument("--bspp", type=cli.at_least(1), default=100, help="batch size per process (default: 100)")
    parser.add_argument("-mp", "--mixed_precision", choices=schema.MIXED_PRECISIONS, default="no")
    parser.add_argument("--compile", action="store_true", help="torch.compile the network, which pays on GPUs")
    parser.add_argument("--feature_extractor", default=INCEPTION, metavar="NAME", help=f"(default: {INCEPTION})")
    parser.add_argument("--feature_layer", metavar="LAYER", help="(default: that of the Frechet distance)")
    parser.add_argument("--feature_weights", type=Path, metavar="PATH", help="local file, for machines without network")
    parser.add_argument("--reference", metavar="DIR|NPZ|NAME", help="real images (default: the training set)")
    parser.add_argument("--metrics", nargs="+", choices=metrics.METRICS, default=list(metrics.METRICS))
    parser.add_argument("--out", type=Path, metavar="DIR", help="(default: evaluation/ beside the weights or samples)")
    return parser.parse()


def main() -> None:
    args = parse_args()
    if (args.weights is None) == (args.samples is None):
        raise UserError("give either --weights PATH or --samples DIR")
    if args.samples and not args.reference:
        raise UserError("--samples: a --reference is needed: a folder, an npz file or the name of a data set")
    accelerator = runtime.start(args.mixed_precision)
    with ExitStack() as locked:
        if args.samples:
            score_folder(args, accelerator, locked)
        else:
            score_weights(args, accelerator, locked)


def score_weights(args, accelerator: Accelerator, locked: ExitStack) -> None:
    """A row for each method x steps x guidance scale x range of images."""
    snap = snapshot.load(args.weights, args.config, args.overrides)
    model = snap.model(models.build, models.codec)
    net = model.net
    runtime.place(net, accelerator, args.compile)
    labels, prompts = asked_for(args, accelerator, snap.config, net)
    plan = [
        SamplerSettings(
            method,
            steps,
            scale,
            args.seed,
            labels,
            prompts,
            args.grid,
            tuned_grids.load(snap.path, method, steps) if args.grid == "tuned" else None,
            cli.solver_options(args, method, args.methods),
        )
        for scale in args.guidance_scale
        for method in args.methods
        for steps in cli.steps_of(args, method)
    ]
    for settings in plan:
        with runtime.blame("evaluate"):
            check(settings, net)
    given = Path(args.weights)
    out = args.out or (given if given.is_dir() else given.parent) / "evaluation"
    locked.enter_context(lock.folder(out, accelerator))
    extractor, real = prepare(args, accelerator, snap.decoded_shape, snap.config)
    identity = {
        "weights_sha256": files.sha256(snap.path),
        "seed": args.seed,
        "labels": labels,
        "prompts": prompts,
        "mixed_precision": args.mixed_precision,
    }

    mine = args.n_samples // accelerator.num_processes
    bar = runtime.progress(accelerator, len(plan) * args.repeats * mine, "images of this process")

    def compute(settings: SamplerSettings, indices: range) -> dict | None:
        cost = Cost()

        def stream() -> Iterator[tuple[range, Tensor]]:
            for result in generate(accelerator, model, snap.image_shape, share(accelerator, indices, args.bspp), settings):
                cost.add(result)
                yield result.indices, result.images
                bar.update(len(result.indices))

        y = labels_of(indices, settings, net.num_classes)
        found = measure(args, accelerator, extractor, real, stream(), y)
        nfe, forwards = cost.mean(accelerator)
        return found and {"NFE": nfe, "forwards": forwards, **found}

    for settings in plan:
        for repeat in range(args.repeats):
            indices = range(repeat * args.n_samples, (repeat + 1) * args.n_samples)
            subject = {
                "weights": f"{given.name if given.is_dir() else given.stem}@{snap.step}",
                "captions": (args.captions or "plain") if net.prompt_bytes else None,
                "method": settings.solver,
                "steps": settings.steps if settings.method not in ADAPTIVE else None,
                "guidance_scale": settings.guidance_scale if net.null is not None else None,
                "n": args.n_samples,
                "first": indices.start,
            }
            which = {**identity, "times": settings.times}  # a grid may be tuned again
            if settings.method in BY_BATCH:
                which["bspp"] = args.bspp
            if not record(args, accelerator, out, subject, which, extractor, real, partial(compute, settings, indices)):
                bar.update(mine)
    bar.close()
    report(accelerator, out)


def asked_for(
    args, accelerator: Accelerator, config: Config, net: torch.nn.Module
) -> tuple[tuple[int, ...] | None, tuple[str, ...] | None]:
    """Labels and prompts of the images: those of the command line; for a network with text one caption of each class, or
    every wording that training never saw."""
    labels = tuple(args.labels) if args.labels else None
    if args.captions and not net.prompt_bytes:
        raise UserError(f"--captions {args.captions}: this network was trained without prompts (model.args.prompt_bytes)")
    if not net.prompt_bytes:
        return labels, None
    source = config.data
    with runtime.blame("data"):
        data = runtime.one_process_first(accelerator, lambda: datasets.build(source.name, source.root, source.args))
    names = data.class_names
    for label in labels or ():
        if not 0 <= label < len(names):
            raise UserError(f"--labels {label}: is out of range; the data set has classes 0 to {len(names) - 1}")
    known = [(label, names[label]) for label in labels or range(len(names))]
    wordings = captions.held_out if args.captions == "held_out" else lambda name: [captions.plain(name)]
    by_class = [[(label, prompt) for prompt in wordings(name)] for label, name in known]
    pairs = [pair for one_of_each in zip(*by_class, strict=False) for pair in one_of_each]  # the same number of each class
    return tuple(label for label, _ in pairs), tuple(prompt for _, prompt in pairs)


def score_folder(args, accelerator: Accelerator, locked: ExitStack) -> None:
    """One row for the images of a folder, by sample.py (whose labels are known) or from elsewhere."""
    note = args.samples / "sampling.json"
    stored = json.loads(note.read_text(encoding="utf-8")) if note.is_file() else None
    path, channels = (args.samples / "images", stored["image_shape"][0]) if stored else (args.samples, 3)
    with runtime.blame("--samples"):
        data = datasets.build("folder", None, {"path": str(path), "channels": channels})
    labels = data.labels
    if stored:
        cycle = tuple(stored["labels"]) if stored["labels"] else None
        labels = labels_of(range(len(data)), SamplerSettings(labels=cycle), stored["num_classes"])
    out = args.out or args.samples / "evaluation"
    locked.enter_context(lock.folder(out, accelerator))
    extractor, real = prepare(args, accelerator, data.image_shape, schema.load(args.config, args.overrides))

    def compute() -> dict | None:
        return measure(args, accelerator, extractor, real, read(data, accelerator, args.bspp, "samples"), labels)

    subject = {"weights": args.samples.name, "n": len(data), "first": 0}
    record(args, accelerator, out, subject, {"images": data.fingerprint()}, extractor, real, compute)
    report(accelerator, out)


def prepare(
    args, accelerator: Accelerator, image_shape: tuple[int, int, int], config: Config
) -> tuple[Extractor | PointSpace, Reference]:
    """The feature extractor, checked on a blank image of the shape to come, and what samples are compared with."""

    def load() -> Extractor | PointSpace:
        if len(image_shape) == 1:
            return PointSpace()
        return Extractor(args.feature_extractor, args.feature_layer, args.feature_weights, accelerator.device)

    with runtime.blame("evaluate"):
        extractor = runtime.one_process_first(accelerator, load)  # it may download its weights
        dimension = extractor.dimension(image_shape)
    root = Path(config.data.root) if config.data.root else datasets.default_root()
    given = args.reference
    if given and given.endswith(".npz"):
        with runtime.blame("evaluate"):
            return extractor, reference.from_npz(Path(given), extractor, dimension)
    with runtime.blame("--reference"):
        if given is None:
            real = datasets.original(config.data.name, config.data.root, config.data.args)
            name, build_args, root = real["name"], real["args"], Path(real["root"]) if real["root"] else root
        elif given in datasets.DATASETS:
            name, build_args = given, {}
        else:
            name, build_args = "folder", {"path": given, "size": image_shape[-1], "channels": image_shape[0]}
        data = runtime.one_process_first(accelerator, lambda: datasets.build(name, root, build_args))
        if data.image_shape[1:] != image_shape[1:]:
            raise ValueError(f"{given or name} has images of {data.image_shape[1:]} pixels, the samples {image_shape[1:]}")
    identity = reference.identity_of(data.fingerprint(), extractor)
    cached = root / "features" / f"{name}-{extractor.name}-{extractor.layer}-{identity}.npy"
    found = [reference.load_cached(cached, extractor.layer) is not None if accelerator.is_main_process else None]
    broadcast_object_list(found)
    if found[0]:
        features = reference.load_cached(cached, extractor.layer)
    else:
        features = collect(accelerator, extractor, read(data, accelerator, args.bspp, "features of the reference"))
        if accelerator.is_main_process:
            try:
                with files.atomic_file(cached) as temporary:
                    reference.save_cached(temporary, features, extractor.layer)
            except OSError as error:
                accelerator.print(f"warning: the features of the reference are not cached: {error}")
    found = reference.from_features(name if given is None else given, identity, features, extractor.layer)
    found.log_density = getattr(data, "log_density", None)
    return extractor, found


def read(data: Data, accelerator: Accelerator, batch_size: int, what: str) -> Iterator[tuple[range, Tensor]]:
    """This process's share of the images of a data set, without augmentation, under a bar that says `what`."""
    mine = share(accelerator, range(len(data)), batch_size)
    with runtime.progress(accelerator, sum(map(len, mine)), what) as bar:
        for batch, images in read_images(data, mine):
            yield batch, images
            bar.update(len(batch))


def collect(
    accelerator: Accelerator, extractor: Extractor | PointSpace, stream: Iterable[tuple[range, Tensor]]
) -> FeatureSet | None:
    """The features of all images of all processes, on the main process; None on the others."""
    features = FeatureSet()
    for indices, images in stream:
        features.add(extractor.layer, indices, extractor(images))
    parts = runtime.gather_to_main(accelerator, features)
    return None if parts is None else merge(parts)


def measure(
    args,
    accelerator: Accelerator,
    extractor: Extractor | PointSpace,
    real: Reference,
    stream: Iterable[tuple[range, Tensor]],
    labels: Tensor | None,
) -> dict | None:
    """The metrics of a row and the seconds that images and features took, on the main process; None on the others."""
    start = time.perf_counter()
    samples = collect(accelerator, extractor, stream)
    seconds = time.perf_counter() - start
    if samples is None:
        return None
    if isinstance(extractor, PointSpace):
        found = points.evaluate(samples.matrix(extractor.layer), real.features, real.log_density)
    else:
        found = metrics.evaluate(extractor, samples, real, None if labels is None else labels.numpy(), args.metrics)
    return {"metrics": found, "seconds": seconds}


def record(
    args, accelerator: Accelerator, out: Path, subject: dict, identity: dict, extractor: Extractor | PointSpace,
    real: Reference, compute: Callable[[], dict | None],
) -> bool:  # fmt: skip
    """Append the row of `subject` to the results; False where it is there already with all metrics that are asked for."""
    identity = {**identity, "extractor": [extractor.name, extractor.layer, extractor.weights_hash], "reference": real.identity}
    row = {**subject, "reference": real.name, "identity": identity, "asked": list(args.metrics)}
    there = [accelerator.is_main_process and table.has(out, row)]
    broadcast_object_list(there)
    if not there[0]:
        result = compute()
        if result is not None:
            table.append_row(out, {**row, **result})
    return not there[0]


def report(accelerator: Accelerator, out: Path) -> None:
    """Write and print the table, draw the plot."""
    if accelerator.is_main_process:
        rows = table.read_rows(out)
        print(table.write(out, rows))
        plots.distance_against_nfe(out / "nfe.png", table.aggregate(rows))
        print(f"in {out}: {' '.join(sorted(p.name for p in out.iterdir() if p.name != files.LOCK))}")
    accelerator.wait_for_everyone()


if __name__ == "__main__":
    runtime.run(main)
