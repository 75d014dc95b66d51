"""The rows of snapshots: their images by each sampler, and the conditions of these images."""

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from itertools import product
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from configs.errors import UserError
from configs.schema import Config
from datasets import DataSet, DataSpec, captions
from flow.evaluation import metrics_2d
from flow.evaluation.checks import check_number_of_starts
from flow.evaluation.real_images import RealImages, load_real_images
from flow.evaluation.reference import same_classes
from flow.evaluation.runner import Evaluation, EvaluationSettings
from flow.model import FlowModel, Network
from flow.runtime import distributed
from flow.runtime.errors import error_context
from flow.sampling import sources
from flow.sampling.conditions import conditions_by_frequency, labels_for
from flow.sampling.generate import NFECounter, build_velocity, generate, shard, to_solver_dtype
from flow.sampling.settings import ALL_TIMES, SamplerSettings
from flow.sampling.space import Space
from flow.solvers import ADAPTIVE, HAS_TOLERANCES
from flow.source import GAUSSIAN

HELD_OUT_POINTS = 2000  # whose log-density under a flow of points is reported, the first of another seed


@dataclass
class SnapshotEvaluator:
    """Rows of snapshots by the same samplers; what they have in common is loaded once."""

    evaluation: Evaluation
    plan: list[SamplerSettings]
    identity: dict[str, Any]  # of every row

    @classmethod
    def build(
        cls, settings: EvaluationSettings, accelerator: Accelerator, out: Path, config: Config, space: Space, model: FlowModel,
        class_names: Sequence[str], plan: list[SamplerSettings], captions_of: list[list[str]] | None, by_frequency: bool,
        further_identity: dict[str, Any] | None = None,
    ) -> "SnapshotEvaluator":  # fmt: skip
        """Load the reference and the extractor. Raises UserError as `check_number_of_starts` does.

        Args:
            class_names: those of the training; () where nobody knows them.
            plan: a row for each, and each range of images.
            by_frequency: replace the labels of the plan by the frequency of the classes in the reference.
            further_identity: what else distinguishes these rows from those of the same weights.
        """
        net = model.net
        with error_context("flow.source"):
            source = distributed.main_process_first(accelerator, lambda: sources.fingerprint(model))
        check_number_of_starts(settings, model.source)
        real_images = load_real_images(settings.reference, accelerator, space.decoded_shape, config)
        identity: dict[str, Any] = {
            "seed": plan[0].seed,
            "labels": plan[0].labels,
            "prompts": plan[0].prompts,
            "mixed_precision": accelerator.mixed_precision,
            **({"source_fingerprint": source} if source else {}),
            **(further_identity or {}),
        }
        num_classes = len(captions_of) if captions_of else net.num_classes

        def has_classes(names: Sequence[str]) -> bool:
            return len(names) == num_classes and (not class_names or same_classes(names, class_names))

        if num_classes and by_frequency:
            counts = class_counts(accelerator, config, real_images, num_classes, has_classes)
            plan, names = resolve_conditions(plan, counts, settings.n_samples * settings.repeats, captions_of)
            identity |= names
        classes_of = [config.data.name] if num_classes else []
        if real_images and has_classes(real_images.data.class_names):
            classes_of.append(real_images.spec.name)
        evaluation = Evaluation.build(settings, accelerator, out, space.decoded_shape, real_images, classes_of, class_names)
        if not has_classes(evaluation.reference.class_names):
            evaluation.reference.labels = None
        evaluation.load_training(config, space.decoded_shape)
        return cls(evaluation, plan, identity)

    def evaluate(self, model: FlowModel, weights_sha256: str, subject: dict) -> list[tuple[dict, bool]]:
        """The rows of one network, and whether they are new; on the main process, empty on the others.

        Args:
            weights_sha256: of the snapshot that it comes from; the main process needs it.
            subject: "weights", "images" and "captions" of the rows.
        """
        ev, net, settings = self.evaluation, model.net, self.evaluation.settings
        identity = {"weights_sha256": weights_sha256, **self.identity}
        log_density = log_density_of(ev.accelerator, model, ev.real_images)
        if log_density:
            identity["held_out_points"] = HELD_OUT_POINTS
        rows = []
        for number, (sampler, repeat) in enumerate(product(self.plan, range(settings.repeats))):
            indices = range(repeat * settings.n_samples, (repeat + 1) * settings.n_samples)
            row = {
                **subject,
                "method": sampler.title,
                "steps": sampler.steps if sampler.method not in ADAPTIVE else None,
                "guidance_scale": sampler.guidance_scale if net.null is not None or sampler.guide else None,
                **columns_of(sampler),
                "n": settings.n_samples,
                "first": indices.start,
            }
            row_identity = {**identity, **columns_of(sampler), "times": sampler.times}  # may be optimized again
            if sampler.method in HAS_TOLERANCES:
                row_identity["bspp"] = settings.batch_size
            compute = partial(self._compute, model, sampler, indices, number, subject["weights"], log_density)
            rows.append(ev.evaluate_row(row, row_identity, compute))
        return [row for row in rows if row is not None]

    def _compute(
        self, model: FlowModel, sampler: SamplerSettings, indices: range, number: int,
        weights: str, log_density: Callable[[SamplerSettings], float] | None,
    ) -> dict | None:  # fmt: skip
        """The columns of row `number`, of the images `indices`, on the main process; None on the others."""
        ev, accelerator, settings = self.evaluation, self.evaluation.accelerator, self.evaluation.settings
        counter, batches = NFECounter(), shard(accelerator, indices, settings.batch_size)
        local = sum(map(len, batches))
        total = len(self.plan) * settings.repeats
        name = f"images of this process, row {number + 1} of {total}"
        bar = distributed.progress(accelerator, local * total, name, local * number)
        bar.leave = False  # the next bar takes its place

        def stream() -> Iterator[tuple[range, Tensor]]:
            with bar:
                for batch in generate(accelerator, model, batches, sampler):
                    counter.add(batch)
                    yield batch.indices, batch.images
                    bar.update(len(batch.indices))

        def images_of(positions: list[int]) -> Tensor:
            again = [indices[k : k + 1] for k in positions]
            return torch.cat([batch.images for batch in generate(accelerator, model, again, sampler)])

        measured, seconds = ev.measure(stream(), labels_for(indices, sampler, model.net.num_classes))
        steps = "" if sampler.method in ADAPTIVE else f", {sampler.steps} steps"
        ev.draw_closest(measured, f"{weights}, {sampler.title}{steps}", images_of)
        nfe, forwards = counter.mean(accelerator)
        if measured is None:
            return None
        if log_density:
            measured.metrics["held_out_log_p"] = log_density(sampler)
        return {"NFE": nfe, "forwards": forwards, **measured.columns, "seconds": seconds}


def columns_of(sampler: SamplerSettings) -> dict[str, str]:
    """The interval, the guide and the source of a row, where it has them."""
    low, high = sampler.guidance_interval
    columns = {"guidance_interval": f"{low:.15g} to {high:.15g}"} if (low, high) != ALL_TIMES else {}
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
    with error_context("data"):
        data = distributed.main_process_first(accelerator, DataSpec.of(config.data).build)
    for label in labels or ():
        if not 0 <= label < len(data.class_names):
            raise UserError(f"--labels {label}: is out of range; the data set has classes 0 to {len(data.class_names) - 1}")
    wordings = captions.held_out if kind == "held_out" else lambda name: [captions.plain(name)]
    return [wordings(name) for name in data.class_names]


def class_counts(
    accelerator: Accelerator, config: Config, source: RealImages | None, num_classes: int,
    has_classes: Callable[[Sequence[str]], bool],
) -> list[int]:  # fmt: skip
    """Images of each class in the reference, or in the training set where the reference has no such classes; where neither is
    there, a warning, and the same number for each class."""

    def training_set() -> DataSet | None:
        try:
            return DataSpec.of(config.data).behind().build()
        except (ValueError, FileNotFoundError):
            return None

    for load in (lambda: source.data if source else None, lambda: distributed.main_process_first(accelerator, training_set)):
        data = load()
        if distributed.any_process(accelerator, data is None):
            continue
        if data is not None and data.labels is not None and has_classes(data.class_names):
            return torch.bincount(data.labels, minlength=num_classes).tolist()
    accelerator.print(
        "warning: the classes take turns, as neither the reference nor the training set is here to tell how frequent they are; "
        "where the classes are not equally frequent this makes the distance larger"
    )
    return [1] * num_classes


def log_density_of(
    accelerator: Accelerator, model: FlowModel, source: RealImages | None
) -> Callable[[SamplerSettings], float] | None:
    """For flows of points: a function of the sampler, the mean log-density of held-out points under the flow with its guidance,
    which depends on no solver; None where there are no such points, where labels are needed, and where the flow starts at
    data, whose density is not known."""
    other = source.spec.held_out() if source else None
    if other is None or other.spec.name != "toys" or model.source.name != GAUSSIAN:
        return None
    if model.net.num_classes is not None or model.net.max_prompt_bytes:
        return None
    points: Any = other.spec.build()
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
