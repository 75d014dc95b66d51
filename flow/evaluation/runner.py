"""Evaluation: rows of metrics of images from a network, from a folder, and of real images."""

import hashlib
import json
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor

import datasets
from configs.schema import Config, UserError
from datasets import DataSet, captions
from datasets.images import EncodedImages
from flow.evaluation import feature_cache, memorization, metrics, metrics_2d, plots, reference, table
from flow.evaluation.comparison import Comparison
from flow.evaluation.features import INCEPTION, BlockMoments, Extractor, FeatureSet
from flow.evaluation.intervals import BLOCKS
from flow.evaluation.metrics_2d import PointSpace
from flow.evaluation.real_images import RealImages, build_if_present, load_features, load_real_images
from flow.evaluation.reference import Reference
from flow.model import FlowModel, Network
from flow.noise import generator
from flow.runtime import distributed, files
from flow.runtime.errors import error_context
from flow.sampling.conditions import conditions_by_frequency, labels_by_frequency, labels_for
from flow.sampling.generate import NFECounter, build_velocity, generate, shard, to_solver_dtype
from flow.sampling.settings import ALL_TIMES, SamplerSettings
from flow.sampling.space import Space
from flow.solvers import HAS_TOLERANCES
from flow.solvers.torchdiffeq import ADAPTIVE
from flow.source import GAUSSIAN

HELD_OUT_POINTS = 2000  # whose log-density under a flow of points is reported, the first of another seed


@dataclass(frozen=True)
class EvaluationSettings:
    """What is measured, and against what."""

    owner: str  # of the images, in errors: "--weights PATH" or "--samples DIR"
    n_samples: int = 50_000
    repeats: int = 1
    batch_size: int = 100  # per process
    feature_extractor: str = INCEPTION
    feature_layer: str | None = None  # None: that of the Frechet distance
    feature_weights: Path | None = None
    allow_remote_code: bool = False  # of feature extractors that torch.hub downloads
    reference: str | None = None  # a folder, an npz file, the name of a data set; None: the training set
    metrics: tuple[str, ...] = metrics.DEFAULT
    control: bool = True  # a row of real images


@dataclass
class Evaluation:
    """The table in a folder, and what its rows are measured with."""

    settings: EvaluationSettings
    accelerator: Accelerator
    out: Path
    extractor: Extractor | PointSpace
    reference: Reference
    real_images: RealImages | None  # of the reference; None for statistics of an npz file
    dimension: int  # of the features
    training: memorization.TrainingSet | None = None  # of the weights, on the main process
    closest: memorization.Closest | None = None  # of the last comparison, on the main process
    draw: Callable[[], None] | None = None  # the figure of the last row of samples

    @classmethod
    def build(
        cls, settings: EvaluationSettings, accelerator: Accelerator, out: Path, image_shape: tuple[int, ...],
        source: RealImages | None,
    ) -> "Evaluation":  # fmt: skip
        """The feature extractor, checked on a blank image of the shape to come, and the reference, cached or computed."""
        extractor, dimension = load_extractor(settings, accelerator, image_shape)
        points = isinstance(extractor, PointSpace)
        with error_context("evaluate"):
            if source is None:
                real = reference.from_npz(Path(settings.reference or ""), extractor, dimension)
            else:
                what = "features of the reference"
                identity, features = load_features(
                    accelerator, extractor, settings.batch_size, source.data, source, what, real_layers(extractor)
                )
                real = reference.from_features(source.name, identity, features, extractor.layer)
                real.labels, real.class_names = labels_of(source.data), source.data.class_names
        counts = {"samples": settings.n_samples, "reference": dimension + 1 if source is None else len(source.data)}
        for name, n in counts.items():
            if n <= dimension and not points:
                accelerator.print(
                    f"warning: {n} images ({name}) are too few for a Frechet distance of {dimension} features: with n <= "
                    f"{dimension} the covariance is singular and the distance far too large; take more, better 10,000"
                )
        return cls(settings, accelerator, out, extractor, real, source, dimension)

    def load_training(self, config: Config, image_shape: tuple[int, ...]) -> None:
        """The training set of the weights of this configuration, for `memorization`. Raises UserError where it is not here."""
        accelerator, extractor = self.accelerator, self.extractor
        if "memorization" not in self.settings.metrics or isinstance(extractor, PointSpace):
            return
        source = load_real_images(None, accelerator, image_shape, config, "--metrics memorization")
        assert source is not None, "it is no npz file"

        def features_of(data: DataSet, what: str) -> Tensor | None:
            layers, batch_size = real_layers(extractor), self.settings.batch_size
            _, features = load_features(accelerator, extractor, batch_size, data, source, what, layers)
            return None if features is None else features.matrix(extractor.layer)

        other = datasets.held_out(source.build)
        held_out = build_if_present(accelerator, other[1], "held-out images for memorization") if other else None
        if held_out is None:
            accelerator.print(
                f"note: memorization: {source.name} has no held-out images; its threshold is that of training images, each "
                "compared with all others"
            )
        features = features_of(source.data, "features of the training set")
        held_out_features = features_of(held_out, "features of held-out images") if held_out is not None else None
        if features is not None:
            self.training = memorization.training_set(source.data, features, held_out_features)

    def draw_closest(self, title: str, images_of: Callable[[list[int]], Tensor]) -> None:
        """Have the report draw memorization.png: the samples just compared that are nearest to a training image.

        `images_of` gives samples by their positions; it is called here, where the network still has the weights of the row.
        """
        closest, training = self.closest, self.training
        if closest is None or training is None:
            return
        samples = images_of(closest.samples)

        def draw() -> None:
            nearest = torch.stack([training.data[k][0] for k in closest.training])
            plots.closest_images(self.out / "memorization.png", samples, nearest, closest.ratios, title)

        self.draw = draw

    def evaluate_row(self, subject: dict, identity: dict, compute: Callable[[], dict | None]) -> tuple[dict, bool] | None:
        """Append the row of `subject` to the results, unless it is there with all requested metrics.

        Returns it and whether it is new, on the main process; None on the others, and where nothing could be computed.
        """
        extractor = [self.extractor.name, self.extractor.layer, self.extractor.weights_hash]
        identity = {**identity, "extractor": extractor, "reference": self.reference.identity}
        row = {**subject, "reference": self.reference.name, "identity": identity, "requested": list(self.settings.metrics)}
        main = self.accelerator.is_main_process
        if not distributed.any_process(self.accelerator, main and table.contains(self.out, row)):
            result = compute()
            if result is None:
                return None
            table.append_row(self.out, {**row, **result})
            return {**row, **result}, True
        existing = table.find(self.out, row) if main else None
        return (existing, False) if existing else None

    def measure(self, stream: Iterable[tuple[range, Tensor]], labels: Tensor | None) -> dict | None:
        """Metrics of a stream of images and the seconds it took, on the main process; None on the others."""
        start = time.perf_counter()
        samples: FeatureSet | BlockMoments | None
        # Moments of all blocks on all processes, in float64, take less memory than the features in float32
        smaller = self.settings.n_samples > 2 * BLOCKS * self.dimension * self.accelerator.num_processes
        if smaller and set(self.settings.metrics) <= set(metrics.FROM_MOMENTS) and not isinstance(self.extractor, PointSpace):
            samples = feature_cache.collect_moments(self.accelerator, self.extractor, stream)
        else:
            samples = feature_cache.collect(self.accelerator, self.extractor, stream)
        seconds = time.perf_counter() - start
        if samples is None:
            return None
        return {**self.compute_metrics(samples, self.reference, labels, self.training), "seconds": seconds}

    def compute_metrics(
        self, samples: FeatureSet | BlockMoments, ref: Reference, labels: Tensor | None,
        training: memorization.TrainingSet | None,
    ) -> dict[str, dict]:  # fmt: skip
        """{"metrics": those requested, "standard_errors": where they are known}, under a bar of their own."""
        with error_context(self.settings.owner):
            if isinstance(self.extractor, PointSpace):
                assert ref.features is not None and isinstance(samples, FeatureSet), "points are compared with points"
                return {"metrics": metrics_2d.evaluate(samples.matrix(self.extractor.layer), ref.features)}
            y = None if labels is None else labels.numpy()
            with distributed.progress(self.accelerator, 0, "metrics") as bar:
                bar.leave = False
                comparison = Comparison(self.extractor, samples, ref, y, training, bar=bar)
                values = metrics.evaluate(comparison, self.settings.metrics)
                self.closest = comparison.closest
                return {"metrics": values, "standard_errors": comparison.standard_errors}

    def write_report(self) -> str:
        """Write the table and draw the figures; returns the table, on the main process."""
        text = ""
        if self.accelerator.is_main_process:
            rows = table.read_rows(self.out)
            text, entries = table.write(self.out, rows), table.aggregate(rows)
            plots.distance_against_nfe(self.out / "nfe.png", table.without_earlier_snapshots(entries))
            plots.distance_against_images(self.out / "snapshots.png", entries)
            plots.distance_against_width(self.out / "ema_width.png", entries)
            if self.draw:
                self.draw()
        return text


def load_extractor(
    settings: EvaluationSettings, accelerator: Accelerator, image_shape: tuple[int, ...]
) -> tuple[Extractor | PointSpace, int]:
    """The feature extractor and its dimension for images of this shape. Raises UserError where it is not to be had."""

    def load() -> Extractor | PointSpace:
        if Space(image_shape).is_points:
            return PointSpace()
        name, layer, weights = settings.feature_extractor, settings.feature_layer, settings.feature_weights
        return Extractor(name, layer, weights, accelerator.device, settings.allow_remote_code)

    with error_context("evaluate"):
        extractor = distributed.main_process_first(accelerator, load)  # it may download its weights
        return extractor, extractor.dimension(image_shape)


def real_layers(extractor: Extractor | PointSpace) -> list[str]:
    """Layers of real images that are stored; nobody asks for their Inception Score."""
    return [name for name in extractor.layers if name != extractor.isc_layer]


def labels_of(data: DataSet) -> np.ndarray | None:
    return None if data.labels is None else data.labels.numpy()


@dataclass
class SnapshotEvaluator:
    """Rows of snapshots by the same samplers; what they have in common is loaded once."""

    evaluation: Evaluation
    plan: list[SamplerSettings]
    identity: dict[str, Any]  # of every row

    @classmethod
    def build(
        cls, settings: EvaluationSettings, accelerator: Accelerator, out: Path, config: Config, space: Space, net: Network,
        plan: list[SamplerSettings], captions_of: list[list[str]] | None, by_frequency: bool,
    ) -> "SnapshotEvaluator":  # fmt: skip
        """plan: a row for each, and each range of images.

        by_frequency: replace the labels of the plan by the frequency of the classes in the reference.
        """
        real_images = load_real_images(settings.reference, accelerator, space.decoded_shape, config)
        identity: dict[str, Any] = {
            "seed": plan[0].seed,
            "labels": plan[0].labels,
            "prompts": plan[0].prompts,
            "mixed_precision": accelerator.mixed_precision,
        }
        num_classes = len(captions_of) if captions_of else net.num_classes
        if num_classes and by_frequency:
            counts = class_counts(accelerator, config, real_images, num_classes)
            plan, names = resolve_conditions(plan, counts, settings.n_samples * settings.repeats, captions_of)
            identity |= names
        evaluation = Evaluation.build(settings, accelerator, out, space.decoded_shape, real_images)
        if num_classes != len(evaluation.reference.class_names):
            evaluation.reference.labels = None
        evaluation.load_training(config, space.decoded_shape)
        return cls(evaluation, plan, identity)

    def evaluate(
        self, model: FlowModel, image_shape: tuple[int, ...], weights_sha256: str, subject: dict
    ) -> list[tuple[dict, bool]]:
        """The rows of one network, and whether they are new; on the main process, empty on the others.

        Args:
            image_shape: of what the network sees.
            weights_sha256: of the snapshot that it comes from; the main process needs it.
            subject: "weights", "images" and "captions" of the rows.
        """
        ev, net, plan = self.evaluation, model.net, self.plan
        settings, accelerator = ev.settings, ev.accelerator
        identity = {"weights_sha256": weights_sha256, **self.identity}
        log_density = log_density_of(accelerator, model, ev.real_images)
        if log_density:
            identity["held_out_points"] = HELD_OUT_POINTS

        def compute(sampler: SamplerSettings, indices: range, number: int) -> dict | None:
            counter = NFECounter()
            batches = shard(accelerator, indices, settings.batch_size)
            local = sum(map(len, batches))
            total, name = len(plan) * settings.repeats, "images of this process"
            bar = distributed.progress(accelerator, local * total, f"{name}, row {number + 1} of {total}", local * number)
            bar.leave = False  # the next bar takes its place

            def stream() -> Iterator[tuple[range, Tensor]]:
                with bar:
                    for batch in generate(accelerator, model, image_shape, batches, sampler):
                        counter.add(batch)
                        yield batch.indices, batch.images
                        bar.update(len(batch.indices))

            def images_of(positions: list[int]) -> Tensor:
                again = [indices[k : k + 1] for k in positions]
                return torch.cat([batch.images for batch in generate(accelerator, model, image_shape, again, sampler)])

            row = ev.measure(stream(), labels_for(indices, sampler, net.num_classes))
            steps = "" if sampler.method in ADAPTIVE else f", {sampler.steps} steps"
            ev.draw_closest(f"{subject['weights']}, {sampler.solver}{steps}", images_of)
            nfe, forwards = counter.mean(accelerator)
            if row and log_density:
                row["metrics"]["held_out_log_p"] = log_density(sampler)
            return row and {"NFE": nfe, "forwards": forwards, **row}

        numbers, rows = count(), []
        for sampler in plan:
            for repeat in range(settings.repeats):
                indices = range(repeat * settings.n_samples, (repeat + 1) * settings.n_samples)
                row = {
                    **subject,
                    "method": sampler.solver,
                    "steps": sampler.steps if sampler.method not in ADAPTIVE else None,
                    "guidance_scale": sampler.guidance_scale if net.null is not None or sampler.guide else None,
                    **columns_of(sampler),
                    "n": settings.n_samples,
                    "first": indices.start,
                }
                row_identity = {**identity, **columns_of(sampler), "times": sampler.times}  # may be optimized again
                if sampler.method in HAS_TOLERANCES:
                    row_identity["bspp"] = settings.batch_size
                rows.append(ev.evaluate_row(row, row_identity, partial(compute, sampler, indices, next(numbers))))
        return [row for row in rows if row is not None]


def columns_of(sampler: SamplerSettings) -> dict[str, str]:
    """The interval, the guide and the source of a row, where it has them."""
    low, high = sampler.guidance_interval
    columns = {"guidance_interval": f"{low:g} to {high:g}"} if (low, high) != ALL_TIMES else {}
    return columns | {name: value for name in ("guide", "source") if (value := getattr(sampler, name))}


def resolve_conditions(
    plan: list[SamplerSettings], counts: list[int], n: int, captions_of: list[list[str]] | None
) -> tuple[list[SamplerSettings], dict[str, Any]]:
    """The plan with labels (and prompts) of n images by the frequency of the classes, and their entries of a row's identity.

    Classes that are equally frequent take turns: the plan stays as it is.
    """
    if len(set(counts)) == 1:
        return plan, {}
    labels, prompts = conditions_by_frequency(counts, n, captions_of)
    plan = [replace(sampler, labels=labels, prompts=prompts) for sampler in plan]
    digest = hashlib.sha256(json.dumps(counts).encode()).hexdigest()[:16]
    return plan, {"labels": f"by frequency {digest}", "prompts": captions_of}


def captions_by_class(
    kind: str | None, labels: Sequence[int] | None, accelerator: Accelerator, config: Config, net: Network
) -> list[list[str]] | None:
    """Captions of each class for a network with text: one, or every wording that training never saw."""
    if kind and not net.max_prompt_bytes:
        raise UserError(f"--captions {kind}: this network was trained without prompts (model.args.max_prompt_bytes)")
    if not net.max_prompt_bytes:
        return None
    source = config.data
    with error_context("data"):
        data = distributed.main_process_first(accelerator, lambda: datasets.build(source.name, source.root, source.args))
    for label in labels or ():
        if not 0 <= label < len(data.class_names):
            raise UserError(f"--labels {label}: is out of range; the data set has classes 0 to {len(data.class_names) - 1}")
    wordings = captions.held_out if kind == "held_out" else lambda name: [captions.plain(name)]
    return [wordings(name) for name in data.class_names]


def class_counts(accelerator: Accelerator, config: Config, source: RealImages | None, num_classes: int) -> list[int]:
    """Images of each class in the reference, or in the training set where the reference has no such classes; where neither is
    there, a warning, and the same number for each class."""

    def training_set() -> DataSet | None:
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


def evaluate_folder(
    settings: EvaluationSettings, accelerator: Accelerator, out: Path, samples: Path, config: Config, data: EncodedImages,
    stored: dict[str, Any] | None, trained: bool,
) -> None:  # fmt: skip
    """One row for the images `data` of a folder, then the report.

    Args:
        stored: its sampling.json, which tells the labels.
        trained: whether `config` is that of the training.
    """
    labels = data.labels
    if stored:
        turns = tuple(stored["labels"]) if stored["labels"] else None
        with error_context(f"--samples {samples}: not a file of sample.py"):
            indices = [int(Path(data.name_of(k)).stem) for k in range(len(data))]  # an interrupted run leaves gaps
        labels = labels_for(indices, SamplerSettings(labels=turns), stored["num_classes"])
    real_images = load_real_images(settings.reference, accelerator, data.image_shape, config)
    ev = Evaluation.build(settings, accelerator, out, data.image_shape, real_images)
    if trained:
        ev.load_training(config, data.image_shape)
    elif "memorization" in settings.metrics:
        accelerator.print("note: no memorization: the training set of these images is not known; name it with -c")
        ev.settings = replace(settings, metrics=tuple(name for name in settings.metrics if name != "memorization"))
    matching = real_images and len(real_images.data.class_names) == (stored or {}).get("num_classes")
    real_labels = real_images.data.labels if real_images and matching else None
    if not matching and data.class_names != ev.reference.class_names:
        ev.reference.labels = None
    if stored and not stored["labels"] and real_labels is not None and len(set(real_labels.bincount().tolist())) > 1:
        accelerator.print(
            f"warning: the images of {samples} take turns over the classes, which are not equally frequent in the "
            "reference; this makes the distance larger (with --weights the classes are drawn by their frequency)"
        )
    add_control(ev)
    subject = {"weights": samples.name, "n": len(data), "first": 0}
    images = partial(feature_cache.read, data, accelerator, settings.batch_size, "samples")

    def compute() -> dict | None:
        row = ev.measure(images(), labels)
        ev.draw_closest(samples.name, lambda positions: torch.stack([data[k][0] for k in positions]))
        return row

    training = {"training": ev.training.data.fingerprint()} if ev.training else {}
    ev.evaluate_row(subject, {"images": data.fingerprint(), **training}, compute)
    accelerator.print(ev.write_report())
    accelerator.wait_for_everyone()


def read_folder(samples: Path) -> tuple[EncodedImages, dict[str, Any] | None]:
    """The images of a folder, and what sample.py wrote beside them, None for a folder from elsewhere."""
    note, stored = samples / "sampling.json", None
    if note.is_file():
        with error_context(f"--samples {samples}: sampling.json cannot be used"):
            stored = sampling_of(files.read_json(note))
    path, channels = (samples / "images", stored["image_shape"][0]) if stored else (samples, 3)
    with error_context("--samples"):
        args = {"path": str(path), "channels": channels}
        data = datasets.build(name="folder", root=None, args=args)
    assert isinstance(data, EncodedImages)
    return data, stored


def add_control(ev: Evaluation) -> dict | None:
    """The row of a perfect model: as many real images as there are samples, or as there are, that are not in the reference.
    It is returned on the main process, where there is one.

    They come from the other split of the data set, for toys from another seed; where a set has neither, from a random half
    of the reference that is compared with the other half. Their classes are as frequent as in the reference, as those of
    samples are; within a class, and where there are no labels, they are a random choice.
    """
    accelerator, source = ev.accelerator, ev.real_images
    if not ev.settings.control:
        return None
    if source is None:
        accelerator.print("note: no row of real images: an npz file of statistics holds none")
        return None
    other, data = datasets.held_out(source.build), source.data
    if other:
        held_out = build_if_present(accelerator, other[1], "row of real images")
        if held_out is None:
            return None
        data = held_out
    order = generator("control").permutation(len(data))
    pool, rest = (order, None) if other else (order[: len(data) // 2], order[len(data) // 2 :])
    ref_labels = source.data.labels if rest is None or source.data.labels is None else source.data.labels[rest]
    n = min(ev.settings.n_samples, len(pool))
    positions = choose_by_frequency(pool.tolist(), data.labels, ref_labels, n)

    def compute() -> dict | None:
        start = time.perf_counter()
        layer, ref, training = ev.extractor.layer, ev.reference, ev.training
        if rest is None:
            _, samples = load_features(
                accelerator, ev.extractor, ev.settings.batch_size, data, source, "features of real images",
                ev.extractor.layers, positions,
            )  # fmt: skip
        elif ref.feature_set is not None:
            samples = ref.feature_set.select(layer, np.array(positions))
            ref = reference.from_features(ref.name, ref.identity, ref.feature_set.select(layer, rest), layer)
            ref.class_names, ref.labels = ev.reference.class_names, ev.reference.labels
            ref.labels = None if ref.labels is None else ref.labels[rest]
            if training and training.data.fingerprint() == data.fingerprint():  # the other half plays that part, too
                training = memorization.training_set(data, training.features[torch.from_numpy(rest)], None)
        else:
            return None
        seconds = time.perf_counter() - start
        if samples is None:
            return None
        results = ev.compute_metrics(samples, ref, None if data.labels is None else data.labels[positions], training)
        points: Any = data
        if getattr(points, "log_density", None):
            results["metrics"]["held_out_log_p"] = points.log_density(points.images[positions].double()).mean().item()
        return {**results, "seconds": seconds}

    kind = other[0] if other else "half against half"
    subject = dict.fromkeys(("captions", "method", "steps", "guidance_scale"))
    subject = {"weights": f"{table.CONTROL} ({kind})", **subject, "n": n, "first": 0}
    result = ev.evaluate_row(subject, {"control": kind, **({"images": data.fingerprint()} if other else {})}, compute)
    return result and result[0]


def choose_by_frequency(pool: Sequence[int], labels: Tensor | None, reference_labels: Tensor | None, n: int) -> list[int]:
    """n of the positions in `pool`, each class as often as among the reference labels, in the order of the pool within it.

    A class that runs out is replaced by the next images of the pool; without labels these are all.

    Args:
        labels: int64 [N], the classes by position.
    """
    if labels is None or reference_labels is None:
        return list(pool[:n])
    classes = labels.tolist()
    counts = reference_labels.bincount(minlength=max(classes) + 1).tolist()
    by_class = {c: iter([k for k in pool if classes[k] == c]) for c in range(len(counts))}
    positions = [k for c in labels_by_frequency(counts, n) if (k := next(by_class[c], None)) is not None]
    used = set(positions)
    return positions + [k for k in pool if k not in used][: n - len(positions)]


def log_density_of(
    accelerator: Accelerator, model: FlowModel, source: RealImages | None
) -> Callable[[SamplerSettings], float] | None:
    """For flows of points: a function of the sampler, the mean log-density of held-out points under the flow with its guidance,
    which depends on no solver; None where there are no such points, where labels are needed, and where the flow starts at
    data, whose density is not known."""
    other = datasets.held_out(source.build) if source else None
    if other is None or other[1]["name"] != "toys" or model.source.name != GAUSSIAN:
        return None
    if model.net.num_classes is not None or model.net.max_prompt_bytes:
        return None
    points: Any = datasets.build(**other[1])
    x1 = to_solver_dtype(points.images[:HELD_OUT_POINTS], accelerator.device)

    @cache
    def log_density(guidance: SamplerSettings) -> float:
        print(f"log-density of {len(x1):,} held-out points under the flow")
        velocity = build_velocity(model, range(len(x1)), guidance, accelerator.device)
        with error_context("log-density of held-out points"):
            return metrics_2d.mean_log_likelihood(velocity, x1)

    def with_guidance_of(sampler: SamplerSettings) -> float:
        scale, interval, guide = sampler.guidance_scale, sampler.guidance_interval, sampler.guide
        return log_density(SamplerSettings(guidance_scale=scale, guidance_interval=interval, guide=guide))

    return with_guidance_of


def sampling_of(stored: dict[str, Any]) -> dict[str, Any]:
    """What sample.py wrote beside its images. Raises ValueError where it is something else."""
    whole = {"image_shape", "labels", "num_classes"} <= stored.keys()
    if whole:
        shape, labels, classes = stored["image_shape"], stored["labels"] or [], stored["num_classes"] or 0
        if isinstance(shape, list) and len(shape) == 1:
            raise ValueError("it is of points, not of images; evaluate their flow with --weights")
        lists = isinstance(shape, list) and isinstance(labels, list) and len(shape) == 3
        whole = lists and all(type(n) is int and 0 <= n < 2**31 for n in [*shape, *labels, classes])
    if not whole:
        raise ValueError("it lacks image_shape, labels or num_classes, or holds something else there")
    return stored
