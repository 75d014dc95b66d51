"""Tables of distance to the data against NFE: `accelerate-launch evaluate.py --weights runs/mnist --methods euler heun ...`.

One row for each method, number of steps, guidance scale and range of images. Images go from the network straight into
the feature extractor, on every process. `--samples DIR` scores a folder of images instead. `--out` gets results.jsonl,
results.csv, results.md and nfe.png; rows that are there already are not computed again.

The classes of the images are as frequent as in the reference. A row `real (...)` shows the floor: as many real images that are
not in the reference, from the other split of the data set; where it has none, one random half against the other half.
"""

import hashlib
import json
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from torch import Tensor

import datasets
from configs import schema
from configs.schema import Config, UserError
from datasets import captions
from flow.evaluation import feature_cache, metrics, metrics_2d, plots, reference, table
from flow.evaluation.features import INCEPTION, Extractor, FeatureSet
from flow.evaluation.metrics_2d import PointSpace
from flow.evaluation.reading import Data
from flow.evaluation.reference import Reference
from flow.model import FlowModel
from flow.noise import generator
from flow.runtime import cli, distributed, files, lock
from flow.runtime.errors import cli_main, error_context
from flow.sampling import grid_store, snapshot
from flow.sampling.conditions import conditions_by_frequency, conditions_in_turn, labels_for
from flow.sampling.generate import (
    NFECounter,
    build_velocity,  # fmt: skip
    generate,
    shard,
    to_solver_dtype,
)
from flow.sampling.settings import SamplerSettings, validate
from flow.solvers import HAS_TOLERANCES, SOLVERS
from flow.solvers.torchdiffeq import ADAPTIVE

EXAMPLES = """\
  accelerate-launch evaluate.py --weights runs/mnist --feature_extractor mnist --methods euler heun --sampling_steps 5 10 50
  accelerate-launch evaluate.py --weights runs/cifar10 --methods heun --sampling_steps 18 --n_samples 50000 --repeats 3
  accelerate-launch evaluate.py --samples samples/mnist --reference mnist --feature_extractor mnist"""

HELD_OUT_POINTS = 2000  # whose log-density under a flow of points is reported, the first of another seed


def parse_args():
    parser = cli.Parser(__doc__, EXAMPLES)
    parser.add_argument("-c", "--config", metavar="YAML", help="configuration; default: the one inside the weights")
    parser.add_argument("--weights", metavar="PATH", help="run folder, checkpoint folder or .safetensors")
    parser.add_argument("--samples", type=Path, metavar="DIR", help="score this folder of images, no weights needed")
    parser.add_argument("--methods", nargs="+", choices=SOLVERS, default=["euler"], help="solvers (default: euler)")
    cli.add_step_flags(parser, [100], several=True)
    cli.add_solver_flags(parser)
    parser.add_argument("--guidance_scale", nargs="+", type=cli.guidance_scale, default=[1.0], help="(default: 1, off)")
    parser.add_argument(
        "--labels",
        nargs="+",
        metavar="CLASS",
        help="classes by name or number, in turn (default: each as often as in the reference or training set)",
    )
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
    parser.add_argument(
        "--reference",
        metavar="DIR|NPZ|NAME",
        help="real images; NAME:train or NAME:test is a split (default: the training set)",
    )
    parser.add_argument(
        "--metrics", nargs="+", choices=metrics.METRICS, default=list(metrics.DEFAULT),
        help=f"(default: {' '.join(metrics.DEFAULT)}, which take seconds; kid and prc take minutes for 50,000 images)",
    )  # fmt: skip
    parser.add_argument("--no_control", action="store_true", help="leave out the row of real images that shows the floor")
    parser.add_argument("--out", type=Path, metavar="DIR", help="(default: evaluation/ beside the weights or samples)")
    return parser.parse()


def main() -> None:
    args = parse_args()
    if (args.weights is None) == (args.samples is None):
        raise UserError("give either --weights PATH or --samples DIR")
    if args.samples and not args.reference:
        raise UserError("--samples: a --reference is needed: a folder, an npz file or the name of a data set")
    accelerator = distributed.build_accelerator(args.mixed_precision)
    with ExitStack() as locked:
        if args.samples:
            score_folder(args, accelerator, locked)
        else:
            score_weights(args, accelerator, locked)


def score_weights(args, accelerator: Accelerator, locked: ExitStack) -> None:
    """A row for each method x steps x guidance scale x range of images."""
    snap = snapshot.load(args.weights, args.config, args.overrides)
    model = snap.model()
    net = model.net
    if args.reference is None or net.max_prompt_bytes:
        snap.check_data()
    distributed.prepare_model(net, accelerator, args.compile)
    args.labels = cli.labels_of(args.labels, snap.class_names)
    captions_of = captions_by_class(args, accelerator, snap.config, net)
    labels, prompts = conditions_in_turn(args.labels, captions_of)
    plan = [
        SamplerSettings(
            method,
            steps,
            scale,
            args.seed,
            labels,
            prompts,
            args.time_grid,
            grid_store.load(snap.path, method, steps) if args.time_grid == "optimized" else None,
            cli.solver_options(args, method, args.methods),
        )
        for scale in args.guidance_scale
        for method in args.methods
        for steps in cli.num_steps(args, method)
    ]
    for settings in plan:
        with error_context("evaluate"):
            validate(settings, net)
    given = Path(args.weights)
    out = args.out or (given if given.is_dir() else given.parent) / "evaluation"
    locked.enter_context(lock.folder(out, accelerator))
    source = real_images(args, accelerator, snap.decoded_shape, snap.config)
    identity = {
        "weights_sha256": files.sha256(snap.path),
        "seed": args.seed,
        "labels": labels,
        "prompts": prompts,
        "mixed_precision": args.mixed_precision,
    }
    num_classes = len(captions_of) if captions_of else net.num_classes
    if num_classes and not args.labels:
        counts = class_counts(accelerator, snap.config, source, num_classes)
        if len(set(counts)) > 1:
            labels, prompts = conditions_by_frequency(counts, args.n_samples * args.repeats, captions_of)
            plan = [replace(settings, labels=labels, prompts=prompts) for settings in plan]
            identity["labels"] = f"by frequency {hashlib.sha256(json.dumps(counts).encode()).hexdigest()[:16]}"
            identity["prompts"] = captions_of
    extractor, real = prepare(args, accelerator, snap.decoded_shape, source)
    add_control(args, accelerator, out, extractor, real, source)
    log_density = log_density_of(accelerator, model, source)
    if log_density:
        identity["held_out_points"] = HELD_OUT_POINTS

    def compute(settings: SamplerSettings, indices: range, number: int) -> dict | None:
        cost = NFECounter()
        batches = shard(accelerator, indices, args.bspp)
        local = sum(map(len, batches))
        total, name = len(plan) * args.repeats, "images of this process"
        bar = distributed.progress(accelerator, local * total, f"{name}, row {number + 1} of {total}", local * number)
        bar.leave = False  # the next bar takes its place

        def stream() -> Iterator[tuple[range, Tensor]]:
            with bar:
                for result in generate(accelerator, model, snap.image_shape, batches, settings):
                    cost.add(result)
                    yield result.indices, result.images
                    bar.update(len(result.indices))

        y = labels_for(indices, settings, net.num_classes)
        row = measure(args, accelerator, extractor, real, stream(), y)
        nfe, forwards = cost.mean(accelerator)
        if row and log_density:
            row["metrics"]["held_out_log_p"] = log_density(settings)
        return row and {"NFE": nfe, "forwards": forwards, **row}

    numbers = count()
    for settings in plan:
        for repeat in range(args.repeats):
            indices = range(repeat * args.n_samples, (repeat + 1) * args.n_samples)
            subject = {
                "weights": f"{given.name if given.is_dir() else given.stem}@{snap.step}",
                "captions": (args.captions or "plain") if net.max_prompt_bytes else None,
                "method": settings.solver,
                "steps": settings.steps if settings.method not in ADAPTIVE else None,
                "guidance_scale": settings.guidance_scale if net.null is not None else None,
                "n": args.n_samples,
                "first": indices.start,
            }
            which = {**identity, "times": settings.times}  # a grid may be tuned again
            if settings.method in HAS_TOLERANCES:
                which["bspp"] = args.bspp
            make = partial(compute, settings, indices, next(numbers))
            record(args, accelerator, out, subject, which, extractor, real, make)
    report(accelerator, out)


def captions_by_class(args, accelerator: Accelerator, config: Config, net: torch.nn.Module) -> list[list[str]] | None:
    """Captions of each class for a network with text: one, or every wording that training never saw."""
    if args.captions and not net.max_prompt_bytes:
        raise UserError(f"--captions {args.captions}: this network was trained without prompts (model.args.max_prompt_bytes)")
    if not net.max_prompt_bytes:
        return None
    source = config.data
    with error_context("data"):
        data = distributed.main_process_first(accelerator, lambda: datasets.build(source.name, source.root, source.args))
    for label in args.labels or ():
        if not 0 <= label < len(data.class_names):
            raise UserError(f"--labels {label}: is out of range; the data set has classes 0 to {len(data.class_names) - 1}")
    wordings = captions.held_out if args.captions == "held_out" else lambda name: [captions.plain(name)]
    return [wordings(name) for name in data.class_names]


def class_counts(accelerator: Accelerator, config: Config, source: "Source | None", num_classes: int) -> list[int]:
    """Images of each class in the reference, or in the training set where the reference has no such classes; where neither is
    there, a warning, and the same number for each class."""

    def training_set() -> Data | None:
        try:
            real = datasets.source_dataset(config.data.name, config.data.root, config.data.args)
            return datasets.build(**real)
        except (ValueError, FileNotFoundError):
            return None

    for load in (lambda: source.data if source else None, lambda: distributed.main_process_first(accelerator, training_set)):
        data = load()
        if data is not None and data.labels is not None and len(data.class_names) == num_classes:
            return torch.bincount(data.labels, minlength=num_classes).tolist()
    accelerator.print(
        "warning: the classes take turns, as neither the reference nor the training set is here to tell how frequent they are; "
        "where the classes are not equally frequent this makes the distance larger"
    )
    return [1] * num_classes


def score_folder(args, accelerator: Accelerator, locked: ExitStack) -> None:
    """One row for the images of a folder, by sample.py (whose labels are known) or from elsewhere."""
    note = args.samples / "sampling.json"
    stored = None
    if note.is_file():
        with error_context(f"--samples {args.samples}: sampling.json is damaged"):
            stored = sampling_of(json.loads(note.read_text(encoding="utf-8")))
    path, channels = (args.samples / "images", stored["image_shape"][0]) if stored else (args.samples, 3)
    with error_context("--samples"):
        data = datasets.build("folder", None, {"path": str(path), "channels": channels})
    labels = data.labels
    if stored:
        turns = tuple(stored["labels"]) if stored["labels"] else None
        labels = labels_for(range(len(data)), SamplerSettings(labels=turns), stored["num_classes"])
    out = args.out or args.samples / "evaluation"
    locked.enter_context(lock.folder(out, accelerator))
    args.n_samples = len(data)
    source = real_images(args, accelerator, data.image_shape, schema.load(args.config, args.overrides))
    extractor, real = prepare(args, accelerator, data.image_shape, source)
    real_labels = source.data.labels if source and len(source.data.class_names) == (stored or {}).get("num_classes") else None
    if stored and not stored["labels"] and real_labels is not None and len(set(real_labels.bincount().tolist())) > 1:
        accelerator.print(
            f"warning: the images of {args.samples} take turns over the classes, which are not equally frequent in the "
            "reference; this makes the distance larger (with --weights the classes are drawn by their frequency)"
        )
    add_control(args, accelerator, out, extractor, real, source)

    def compute() -> dict | None:
        return measure(args, accelerator, extractor, real, feature_cache.read(data, accelerator, args.bspp, "samples"), labels)

    subject = {"weights": args.samples.name, "n": len(data), "first": 0}
    record(args, accelerator, out, subject, {"images": data.fingerprint()}, extractor, real, compute)
    report(accelerator, out)


@dataclass
class Source:
    """The real images of a reference."""

    name: str  # in tables
    build: dict  # arguments of datasets.build
    data: Data
    root: Path  # of the cache


def real_images(args, accelerator: Accelerator, image_shape: tuple[int, ...], config: Config) -> Source | None:
    """Those that samples of this shape are compared with; None for an npz file, which holds statistics alone."""
    given, root = args.reference, Path(config.data.root) if config.data.root else datasets.default_root()
    if given and given.endswith(".npz"):
        return None
    with error_context("--reference"):
        split = datasets.named_split(given) if given else None
        if given is None:
            build = datasets.source_dataset(config.data.name, config.data.root, config.data.args)
            root = Path(build["root"]) if build["root"] else root
        elif split:
            build = {"name": split[0], "root": root, "args": split[1]}
        else:
            folder = {"path": given, "size": image_shape[-1], "channels": image_shape[0]}
            build = {"name": "folder", "root": root, "args": folder}
        data = distributed.main_process_first(accelerator, lambda: datasets.build(**build))
        if data.image_shape[1:] != image_shape[1:]:
            name = given or build["name"]
            raise ValueError(f"{name} has images of {data.image_shape[1:]} pixels, the samples {image_shape[1:]}")
    label = f"toys {build['args']['name']}" if build["name"] == "toys" and not given else given or build["name"]
    return Source(label, build, data, root)


def prepare(
    args, accelerator: Accelerator, image_shape: tuple[int, ...], source: Source | None
) -> tuple[Extractor | PointSpace, Reference]:
    """The feature extractor, checked on a blank image of the shape to come, and what samples are compared with."""

    def load() -> Extractor | PointSpace:
        if len(image_shape) == 1:
            return PointSpace()
        return Extractor(args.feature_extractor, args.feature_layer, args.feature_weights, accelerator.device)

    with error_context("evaluate"):
        extractor = distributed.main_process_first(accelerator, load)  # it may download its weights
        dimension = extractor.dimension(image_shape)
        if source is None:
            real = reference.from_npz(Path(args.reference), extractor, dimension)
        else:
            layers = [name for name in extractor.layers if name != extractor.isc_layer]
            what = "features of the reference"
            identity, found = features_of(args, accelerator, extractor, source.data, source, what, layers)
            real = reference.from_features(source.name, identity, found, extractor.layer)
    counts = {"samples": args.n_samples, "reference": dimension + 1 if source is None else len(source.data)}
    for name, n in counts.items():
        if n <= dimension and not isinstance(extractor, PointSpace):
            accelerator.print(
                f"warning: {n} images ({name}) are too few for a Frechet distance of {dimension} features: with n <= "
                f"{dimension} the covariance is singular and the distance far too large; take more, better 10,000"
            )
    return extractor, real


def features_of(
    args, accelerator: Accelerator, extractor: Extractor | PointSpace, data: Data, source: Source, what: str,
    layers: Sequence[str], order: Sequence[int] | None = None,
) -> tuple[str, FeatureSet | None]:  # fmt: skip
    """The identity of these features, and on the main process they themselves, from the cache where they are there."""
    fingerprint = data.fingerprint() + ("" if order is None else f" {len(order)} at random")
    identity = reference.identity_of(fingerprint, extractor)
    path = source.root / "features" / f"{source.build['name']}-{extractor.name}-{extractor.layer}-{identity}.npz"
    return identity, feature_cache.cached(accelerator, extractor, data, identity, path, args.bspp, what, layers, order)


def add_control(
    args, accelerator: Accelerator, out: Path, extractor: Extractor | PointSpace, real: Reference, source: Source | None
) -> None:
    """The row of a perfect model: as many real images as there are samples, or as there are, that are not in the reference.

    They are a random choice from the other split of the data set, for toys points of another seed. Where a set has neither,
    one random half of the reference is compared with the other half.
    """
    if args.no_control:
        return
    if source is None:
        accelerator.print("note: no row of real images: an npz file of statistics holds none")
        return
    other, data = datasets.held_out(source.build), source.data
    if other:

        def load() -> Data | None:
            try:
                return datasets.build(**other[1])
            except FileNotFoundError as error:
                accelerator.print(f"warning: no row of real images: {error}")
                return None

        data = distributed.main_process_first(accelerator, load)
        if distributed.any_process(accelerator, data is None):
            return
    order = generator("control").permutation(len(data))
    n = min(args.n_samples, len(data) if other else len(data) // 2)

    def compute() -> dict | None:
        start = time.perf_counter()
        if other:
            what, layers = "features of real images", extractor.layers
            _, samples = features_of(args, accelerator, extractor, data, source, what, layers, order[:n].tolist())
            against = real
        elif real.feature_set is not None:
            samples = real.feature_set.select(extractor.layer, order[:n])
            rest = real.feature_set.select(extractor.layer, order[len(data) // 2 :])
            against = reference.from_features(real.name, real.identity, rest, extractor.layer)
        else:
            return None
        seconds = time.perf_counter() - start
        if samples is None:
            return None
        labels = None if data.labels is None else data.labels[order[:n]]
        found = compute_metrics(args, accelerator, extractor, samples, against, labels)
        if getattr(data, "log_density", None):
            found["held_out_log_p"] = data.log_density(data.images[order[:n]].double()).mean().item()
        return {"metrics": found, "seconds": seconds}

    kind = other[0] if other else "half against half"
    subject = dict.fromkeys(("captions", "method", "steps", "guidance_scale"))
    subject = {"weights": f"{table.CONTROL} ({kind})", **subject, "n": n, "first": 0}
    record(args, accelerator, out, subject, {"control": kind}, extractor, real, compute)


def log_density_of(
    accelerator: Accelerator, model: FlowModel, source: Source | None
) -> Callable[[SamplerSettings], float] | None:
    """For flows of points: a function of the settings, the mean log-density of held-out points under the flow, which depends
    on no solver and is computed once a guidance scale; None where there are no such points, or where labels are needed."""
    other = datasets.held_out(source.build) if source else None
    if other is None or other[1]["name"] != "toys" or model.net.num_classes is not None or model.net.max_prompt_bytes:
        return None
    x1 = to_solver_dtype(datasets.build(**other[1]).images[:HELD_OUT_POINTS], accelerator.device)
    known: dict[float, float] = {}

    def log_density(settings: SamplerSettings) -> float:
        if settings.guidance_scale not in known:
            print(f"log-density of {len(x1):,} held-out points under the flow")
            velocity = build_velocity(model, range(len(x1)), settings, accelerator.device)
            known[settings.guidance_scale] = metrics_2d.mean_log_likelihood(velocity, x1)
        return known[settings.guidance_scale]

    return log_density


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
    samples = feature_cache.collect(accelerator, extractor, stream)
    seconds = time.perf_counter() - start
    if samples is None:
        return None
    return {"metrics": compute_metrics(args, accelerator, extractor, samples, real, labels), "seconds": seconds}


def compute_metrics(
    args, accelerator: Accelerator, extractor: Extractor | PointSpace, samples: FeatureSet, real: Reference,
    labels: Tensor | None,
) -> dict[str, float]:  # fmt: skip
    """The metrics of a row, under a bar of their own."""
    with error_context(f"--weights {args.weights}" if args.weights else f"--samples {args.samples}"):
        if isinstance(extractor, PointSpace):
            assert real.features is not None, "points are compared with points"
            return metrics_2d.evaluate(samples.matrix(extractor.layer), real.features)
        y = None if labels is None else labels.numpy()
        with distributed.progress(accelerator, 0, "metrics") as bar:
            bar.leave = False
            return metrics.evaluate(extractor, samples, real, y, args.metrics, bar)


def record(
    args, accelerator: Accelerator, out: Path, subject: dict, identity: dict, extractor: Extractor | PointSpace,
    real: Reference, compute: Callable[[], dict | None],
) -> bool:  # fmt: skip
    """Append the row of `subject` to the results; False where it is there already with all metrics that are asked for."""
    identity = {**identity, "extractor": [extractor.name, extractor.layer, extractor.weights_hash], "reference": real.identity}
    row = {**subject, "reference": real.name, "identity": identity, "asked": list(args.metrics)}
    there = [accelerator.is_main_process and table.contains(out, row)]
    broadcast_object_list(there)
    if not there[0]:
        result = compute()
        if result is not None:
            table.append_row(out, {**row, **result})
    return not there[0]


def sampling_of(stored: Any) -> dict[str, Any]:
    """What sample.py wrote beside its images. Raises ValueError where it is something else."""
    whole = isinstance(stored, dict) and {"image_shape", "labels", "num_classes"} <= stored.keys()
    if whole:
        shape, labels, classes = stored["image_shape"], stored["labels"] or [], stored["num_classes"] or 0
        lists = isinstance(shape, list) and isinstance(labels, list) and len(shape) == 3
        whole = lists and all(type(n) is int and 0 <= n < 2**31 for n in [*shape, *labels, classes])
    if not whole:
        raise ValueError("it lacks image_shape, labels or num_classes, or holds something else there")
    return stored


def report(accelerator: Accelerator, out: Path) -> None:
    """Write and print the table, draw the plot."""
    if accelerator.is_main_process:
        rows = table.read_rows(out)
        print(table.write(out, rows))
        plots.distance_against_nfe(out / "nfe.png", table.aggregate(rows))
        print(f"in {out}: {' '.join(sorted(p.name for p in out.iterdir() if p.name != files.LOCK))}")
    accelerator.wait_for_everyone()


if __name__ == "__main__":
    cli_main(main)
