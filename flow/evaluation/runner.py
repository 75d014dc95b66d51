"""What a row of metrics is measured with, and the table that it goes to.

The rows themselves come from snapshots.py, folders.py and control.py.
"""

import hashlib
import json
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from accelerate import Accelerator
from torch import Tensor

from configs.schema import Config
from datasets import DataSet, reading
from flow.evaluation import (
    classifiers,
    collecting,
    memorization,
    metrics,
    metrics_2d,
    pictures,
    plots,
    reference,
    results,
    table,
)
from flow.evaluation.comparison import Comparison
from flow.evaluation.entries import aggregate, without_earlier_snapshots
from flow.evaluation.features import CLASS_LAYER, INCEPTION, Extractor, FeatureSet
from flow.evaluation.frechet import too_few_images_message
from flow.evaluation.metrics_2d import PointExtractor
from flow.evaluation.real_images import RealImages, build_if_present, load_features, load_real_images
from flow.evaluation.reference import Reference
from flow.runtime import distributed
from flow.runtime.errors import error_context
from flow.sampling.space import Space


@dataclass(frozen=True, kw_only=True)
class EvaluationSettings:
    """What is measured, and against what."""

    owner: str  # of the images, in errors: "--weights PATH" or "--samples DIR"
    n_samples: int = 50_000
    n_samples_key: str = "evaluate.n_samples"  # what sets it, in errors: a key, or the flag of evaluate.py
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
class Measurement:
    """Metrics of one set of samples."""

    metrics: dict[str, float]
    standard_errors: dict[str, float] | None  # of the metrics that know theirs; None: no metric of points does
    not_applicable: list[str]  # requested metrics without a value
    closest: memorization.Closest | None = None  # what `memorization` found

    @property
    def columns(self) -> dict[str, dict[str, float]]:
        """The columns of a row of results.jsonl."""
        errors = {} if self.standard_errors is None else {"standard_errors": self.standard_errors}
        return {"metrics": self.metrics, **errors}


@dataclass
class Evaluation:
    """The table in a folder, and what its rows are measured with."""

    settings: EvaluationSettings
    accelerator: Accelerator
    out: Path
    extractor: Extractor | PointExtractor
    reference: Reference
    real_images: RealImages | None  # of the reference; None for statistics of an npz file
    dimension: int  # of the features
    class_names: Sequence[str] = ()  # of the labels of samples, where somebody knows them
    training: memorization.TrainingSet | None = None  # of the weights, on the main process
    training_identity: dict[str, str] = field(default_factory=dict)  # where it is another data set than the reference
    threshold: str = ""  # of `memorization`: the fingerprint of the held-out images that it comes from
    noted: list[str] = field(default_factory=list)  # metrics without a value that a note has named
    draw: Callable[[], None] | None = None  # the figure of the last row of samples
    existing_rows: int = 0  # those that were not computed again
    total_rows: int = 0

    @classmethod
    def build(
        cls, settings: EvaluationSettings, accelerator: Accelerator, out: Path, image_shape: tuple[int, ...],
        source: RealImages | None, classes_of: Sequence[str], class_names: Sequence[str] = (),
    ) -> "Evaluation":  # fmt: skip
        """The feature extractor, checked on a blank image of the shape to come, and the reference, cached or computed.

        Args:
            classes_of: the data sets whose classes the samples may have, for the class accuracy; none: they have no classes.
            class_names: of the labels of samples; () where nobody knows them.
        """
        classifier = classifier_of(classes_of, image_shape) if "accuracy" in settings.metrics else None
        extractor, dimension = load_extractor(settings, accelerator, image_shape, classifier)
        points = isinstance(extractor, PointExtractor)
        with error_context("evaluate"):
            if source is None:
                real = reference.from_npz(Path(settings.reference or ""), extractor, dimension)
            else:
                what = "features of the reference"
                identity, features = load_features(
                    accelerator, extractor, settings.batch_size, source.data, source, what, real_layers(extractor)
                )
                real = reference.from_features(source.name, identity, features, extractor.layer)
                real.labels = label_array(source.data)
                real.class_names = source.data.class_names
        counts = {"samples": settings.n_samples, "reference": dimension + 1 if source is None else len(source.data)}
        for name, n in counts.items():
            if n <= dimension and not points and "fid" in settings.metrics:
                accelerator.print(f"warning: {too_few_images_message(n, name, dimension)}")
        return cls(settings, accelerator, out, extractor, real, source, dimension, class_names)

    def load_training(self, config: Config, image_shape: tuple[int, ...]) -> None:
        """The training set of the weights of this configuration, for `memorization`. Raises UserError where it is not here."""
        accelerator, extractor = self.accelerator, self.extractor
        if "memorization" not in self.settings.metrics or isinstance(extractor, PointExtractor):
            return
        source = load_real_images(None, accelerator, image_shape, config, "--metrics memorization")
        assert source is not None, "it is no npz file"

        def features_of(data: DataSet, what: str) -> Tensor | None:
            layers = real_layers(extractor)
            batch_size = self.settings.batch_size
            _, features = load_features(accelerator, extractor, batch_size, data, source, what, layers)
            return None if features is None else features.matrix(extractor.layer)

        other = source.spec.held_out()
        held_out = build_if_present(accelerator, other.spec, "held-out images for memorization") if other else None
        if held_out is None:
            accelerator.print(
                f"note: memorization: {source.name} has no held-out images; its threshold is that of training images, each "
                "compared with all others"
            )
        features = features_of(source.data, "features of the training set")
        held_out_features = features_of(held_out, "features of held-out images") if held_out is not None else None
        fingerprint = source.data.fingerprint()
        if self.real_images is None or fingerprint != self.real_images.data.fingerprint():
            self.training_identity = {"training": fingerprint}
        if held_out is not None:
            self.threshold = held_out.fingerprint()
        if features is not None:
            self.training = memorization.training_set(source.data, features, held_out_features)

    def draw_closest(self, measured: Measurement | None, title: str, images_of: Callable[[list[int]], Tensor]) -> None:
        """Have the report draw memorization.png: the measured samples that are nearest to a training image.

        `images_of` gives samples by their positions; it is called here, where the network still has the weights of the row.
        """
        closest = measured.closest if measured else None
        training = self.training
        if closest is None or training is None:
            return
        samples = images_of(closest.samples)

        def draw() -> None:
            nearest = reading.read(training.data, closest.training)
            pictures.closest_images(self.out / "memorization.png", samples, nearest, closest.ratios, title)

        self.draw = draw

    def evaluate_row(self, subject: dict, identity: dict, compute: Callable[[], dict | None]) -> tuple[dict, bool] | None:
        """Append the row of `subject` to the results, unless it is there with all requested metrics.

        Returns it and whether it is new, on the main process; None on the others, and where nothing could be computed.
        """
        extractor = [self.extractor.name, self.extractor.layer, self.extractor.weights_hash]
        identity = {**identity, "extractor": extractor, "reference": self.reference.identity, **self.training_identity}
        row = {**subject, "reference": self.reference.name, "identity": identity, "requested": self._requested()}
        main = self.accelerator.is_main_process
        existing = results.find(self.out, row) if main else None
        has_metrics = existing is not None and set(row["requested"]) <= set(existing["requested"])
        self.total_rows += 1
        if not distributed.any_process(self.accelerator, has_metrics):
            result = compute()
            if result is None:
                return None
            results.append(self.out, {**row, **result})
            return {**row, **result}, True
        self.existing_rows += 1
        return (existing, False) if existing else None

    def print_existing(self) -> None:
        """A note where rows were not computed: code of a metric, solver or network that was edited since has not run."""
        if n := self.existing_rows:
            count = f"{n} of {self.total_rows} rows {'was' if n == 1 else 'were'}"
            self.accelerator.print(f"note: {count} in results.jsonl already; name another --out to compute them again")

    def _requested(self) -> list[str]:
        """The metrics by name, with what they depend on beside the identity of a row: earlier rows that were made otherwise
        do not have them."""
        names = {name: name for name in self.settings.metrics}
        if "accuracy" in names and self.extractor.second_net is not None:
            names["accuracy"] = f"accuracy{results.BY}{self.extractor.classifier}"
        if "memorization" in names and self.threshold:
            names["memorization"] = f"memorization{results.BY}{self.threshold}"
        if results.PER_CLASS in names:  # of labels that the samples do not have, there are none
            ref = self.reference
            classes = None if ref.labels is None else [list(ref.class_names), np.bincount(ref.labels).tolist()]
            digest = hashlib.sha256(json.dumps(classes).encode()).hexdigest()[:16]
            names[results.PER_CLASS] = f"{results.PER_CLASS}{results.BY}{digest}"
        return list(names.values())

    def measure(self, stream: Iterable[tuple[range, Tensor]], labels: Tensor | None) -> tuple[Measurement | None, float]:
        """Metrics of a stream of images, on the main process (None on the others), and the seconds that the stream took."""
        start = time.perf_counter()
        samples = collecting.collect(self.accelerator, self.extractor, stream)
        seconds = time.perf_counter() - start
        if samples is None:
            return None, seconds
        measured = self.compute_metrics(samples, self.reference, labels, self.class_names, self.training)
        by_user = self.settings.metrics != metrics.DEFAULT
        if by_user and (new := [name for name in measured.not_applicable if name not in self.noted]):
            self.accelerator.print(f"note: no value of {', '.join(new)} here; what each metric needs: docs/evaluation.md")
            self.noted += new
        return measured, seconds

    def compute_metrics(
        self, samples: FeatureSet, ref: Reference, labels: Tensor | None, class_names: Sequence[str],
        training: memorization.TrainingSet | None,
    ) -> Measurement:  # fmt: skip
        """The requested metrics, under a bar of their own."""
        with error_context(self.settings.owner):
            if isinstance(self.extractor, PointExtractor):
                assert ref.features is not None, "points are compared with points"
                values = metrics_2d.evaluate(samples.matrix(self.extractor.layer), ref.features)
                return Measurement(values, None, [name for name in self.settings.metrics if name != "fid"])
            y = None if labels is None else labels.numpy()
            with distributed.progress(self.accelerator, 0, "metrics") as bar:
                bar.leave = False
                comparison = Comparison(self.extractor, samples, ref, y, class_names, training, bar=bar)
                by_metric = metrics.evaluate(comparison, self.settings.metrics)
            columns = {name: estimate for estimates in by_metric.values() for name, estimate in estimates.items()}
            errors = {name: estimate.standard_error for name, estimate in columns.items()}
            return Measurement(
                metrics={name: estimate.value for name, estimate in columns.items()},
                standard_errors={name: error for name, error in errors.items() if error is not None},
                not_applicable=[name for name, estimates in by_metric.items() if not estimates],
                closest=comparison.closest,
            )

    def write_report(self) -> str:
        """Write the table and draw the figures; returns the table, on the main process."""
        text = ""
        if self.accelerator.is_main_process:
            rows = results.read(self.out)
            text, entries = table.write(self.out, rows), aggregate(rows)
            plots.distance_against_nfe(self.out / "nfe.png", without_earlier_snapshots(entries))
            plots.distance_against_images(self.out / "snapshots.png", entries)
            plots.distance_against_width(self.out / "ema_width.png", entries)
            if self.draw:
                self.draw()
        return text


def load_extractor(
    settings: EvaluationSettings, accelerator: Accelerator, image_shape: tuple[int, ...], classifier: str | None = None
) -> tuple[Extractor | PointExtractor, int]:
    """The feature extractor and its dimension for images of this shape, with the logits of `classifier`. Raises UserError where
    it is not to be had."""

    def load() -> Extractor | PointExtractor:
        if Space(image_shape).is_points:
            return PointExtractor()
        name, layer, weights = settings.feature_extractor, settings.feature_layer, settings.feature_weights
        return Extractor(name, layer, weights, accelerator.device, settings.allow_remote_code, classifier)

    with error_context("evaluate"):
        extractor = distributed.main_process_first(accelerator, load)  # it may download its weights
        return extractor, extractor.dimension(image_shape)


def classifier_of(data_names: Sequence[str], image_shape: tuple[int, ...]) -> str | None:
    """The classifier of the first of these data sets that has one for images of this size."""
    fitting = () if Space(image_shape).is_points else classifiers.fitting(image_shape)
    return next((name for name in data_names if name in fitting), None)


def real_layers(extractor: Extractor | PointExtractor) -> list[str]:
    """Layers of the reference that are stored; nobody asks for its Inception Score, nor for the classes of a second network."""
    others = (extractor.isc_layer, CLASS_LAYER)
    return [name for name in extractor.layers if name not in others]


def label_array(data: DataSet) -> np.ndarray | None:
    """int64 [N]; None without classes."""
    return None if data.labels is None else data.labels.numpy()
