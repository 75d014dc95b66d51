"""Training of a flow: the network, its loss, and batches as a function of (seed, step)."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

import models
from configs import schema
from configs.errors import UserError
from configs.schema import Config, ModelConfig
from datasets import DataSet, DataSpec, captions
from flow import couplings, losses, time_samplers
from flow import path as paths
from flow.couplings import Coupling
from flow.guidance import drop_labels
from flow.losses import Batch, FlowLoss
from flow.model import FlowModel
from flow.noise import generator
from flow.runtime import commands, distributed, files, flags, messages
from flow.runtime.errors import error_context, renaming
from flow.sampling import snapshot
from flow.sampling.conditions import MAX_COLUMNS, classes_with_images, column_names, condition_names, preview_settings
from flow.sampling.generate import generate, shard
from flow.sampling.header import PowerAverage
from flow.sampling.settings import guidance_note, validate
from flow.sampling.space import Space
from flow.source import Source
from flow.training import first_weights
from flow.training.checks import (
    check_conditioning,
    check_loss,
    check_same_classes,
    check_same_data,
    check_same_flow,
    check_source,
)
from flow.training.data_loader import TrainingLoader, loss_noise, micro_batch_size, packing_notes
from flow.training.output_checks import check_forward

NAMED_IN_LOG = 10  # classes


class FlowTask:
    """Trains `config.model` with `config.loss` on `config.data`; implements `flow.training.task.Task`."""

    script = "train.py"

    def __init__(
        self, config: Config, accelerator: Accelerator, resuming: bool = False, stored_class_names: Sequence[str] = ()
    ):  # fmt: skip
        """
        Args:
            resuming: the configuration is that of an earlier run, which knows its number of classes.
            stored_class_names: those that the checkpoint of this run was trained with, where it is known.

        Raises:
            UserError: for whatever in the configuration, the data and the network does not fit together.
        """
        self.config, self.accelerator = config, accelerator
        self.notes: list[str] = []  # for the start of the log
        with error_context("data"):
            self.data = distributed.main_process_first(accelerator, DataSpec.of(config.data).build)
        self.sample_digest = check_same_data(accelerator, config.data.name, self.data)
        self.space = Space(self.data.image_shape, self.data.codec)
        if config.data.autoencoder and self.data.codec is None:
            raise UserError(
                f"data.autoencoder={config.data.autoencoder}: data.name={config.data.name} holds no latents; encode the images "
                "once with scripts.cache_latents"
            )
        self.unit = "points" if self.space.is_points else "images"
        self.class_names = tuple(self.data.class_names) if self.data.labels is not None else ()
        check_same_classes(f"data.args={config.data.args}", stored_class_names, self.class_names)
        if not resuming:
            schema.set_auto_classes(config, self.class_names)
        torch.manual_seed(config.seed)  # of the initial weights
        with error_context("model"):
            self.net: Any = self.build_network()
            self.model = distributed.main_process_first(  # an autoencoder may be downloaded
                accelerator, lambda: snapshot.flow_model(self.net, self.data.image_shape, config, self.data.codec)
            )
        check_conditioning(self.data, self.net, resuming)
        check_forward(config.model.name, self.net, self.data.image_shape, accelerator)
        self.loss = build_loss(config)
        check_loss(config, self.loss, self.net, self.data)
        if config.flow.time_sampler != "uniform" and not self.loss.uses_time_sampler:
            self.notes.append(f"flow.time_sampler={config.flow.time_sampler}: has no effect on loss.name={config.loss.name}")
        self.trained_classes = classes_with_images(self.data.labels, self.net.num_classes)
        with error_context("preview"):
            self.preview_settings = preview_settings(config, self.net, self.data.class_names, self.trained_classes)
            validate(self.preview_settings, self.model)
        if note := guidance_note(self.preview_settings, self.model):
            self.notes.append(f"preview.{note}")
        if note := self.space.channels_note:
            self.notes.append(note)
        if self.trained_classes:
            names = condition_names(self.preview_settings, self.data.class_names, self.net.num_classes)
            self.notes.append(
                f"model.args.num_classes={self.net.num_classes}: only {len(names)} classes have images "
                f"({messages.first_names(names, NAMED_IN_LOG)}), and only they are trained; sample with --labels"
            )
        distributed.main_process_first(accelerator, lambda: check_source(config, self.model))
        train = config.train
        rows = micro_batch_size(train.batch_size, accelerator.num_processes, train.gradient_accumulation_steps)
        self.coupling = build_coupling(config, self.data, self.model.source, rows)
        if self.coupling.note:
            self.notes.append(f"flow.coupling={config.flow.coupling}: {self.coupling.note}")
        self.loader = TrainingLoader.of(accelerator, config, self.data, on_cpu=self.coupling.needs_data)

    def load_init_weights(self) -> None:
        """Start from the weights of train.init_from, if any. Raises UserError where they do not fit."""
        init_from = self.config.train.init_from
        if init_from:
            with error_context("train.init_from"), renaming("--weights ", "train.init_from="):
                source = snapshot.load(init_from)
                snapshot.check_codec(f"train.init_from={init_from}", source, self.data.codec)
                check_same_flow(f"train.init_from={init_from}", source.config, self.config)
                changes = _changes_of_model(source.config.model, self.config.model)
                try:
                    new = first_weights.load(source, self.net, self.class_names if self.net.num_classes is not None else ())
                except UserError as error:
                    raise UserError("; ".join([str(error), *changes])) from None
            self.notes += [f"train.init_from={init_from}: {note}" for note in [*new, *changes]]

    def build_network(self) -> Any:
        return models.build(self.config.model.name, self.data.image_shape, self.config.model.args)

    def batches(self, first_step: int) -> Iterator[list[Batch]]:
        """Each batch with its source samples, uniforms, further noise and labels, some of which are dropped."""
        seed, size, device = self.config.seed, self.config.train.batch_size, self.accelerator.device
        for step, micro_batches in enumerate(self.loader.steps(first_step, self.config.train.steps), start=first_step):
            uniforms = time_samplers.stratified(seed, step, size, self.loss.num_uniforms)  # of the global batch
            for i, batch in enumerate(micro_batches):
                coupled_labels = batch.y if self.net.null is not None else None
                x0 = self.coupling.sample_x0(batch.sample_ids, batch.indices, batch.x1, coupled_labels)
                micro_batches[i] = replace(
                    batch,
                    x1=distributed.to_device(batch.x1, device),
                    x0=distributed.to_device(x0, device),
                    uniforms=distributed.to_device(uniforms[batch.rows], device),
                    y=self._condition(batch, step),
                    noise=loss_noise(self.loss.draws, seed, batch, device),
                    progress=step / self.config.train.steps,
                    **self._states(batch),
                )
            yield micro_batches

    def write_snapshot(
        self, path: Path, weights: dict[str, Tensor], step: int, half_life_images: int,
        power_average: PowerAverage | None = None,
    ) -> None:  # fmt: skip
        names = self.class_names if self.net.null is not None else ()
        shape = self.data.image_shape
        snapshot.save(path, weights, self.config, shape, step, half_life_images, self.data.codec, names, power_average)

    def read_snapshot(self, path: Path) -> dict[str, Tensor]:
        average = snapshot.load(path)
        snapshot.check_codec(f"data.args={self.config.data.args}", average, self.data.codec)
        return average.weights

    def model_with(self, net: Any) -> FlowModel:
        """The flow of this task with another network of the same shape, e.g. the averaged one."""
        return replace(self.model, net=net)

    def preview(self, net: Any, step: int) -> tuple[Tensor | None, dict[str, float]]:
        """A grid of samples, or a scatter plot of points; None where sampling fails. All processes share the sampling."""
        n, settings = self.config.preview.n_samples, self.preview_settings
        batches = shard(self.accelerator, range(n), self.space.preview_batch_size)
        samples = generate(self.accelerator, self.model_with(net), batches, settings)
        parts = []
        reason = None
        try:
            parts = [(batch.indices.start, batch.images) for batch in samples]
        except UserError as error:  # a picture less is no reason to end a training
            reason = str(error)
        reasons = distributed.gather_to_main(self.accelerator, reason)
        gathered = distributed.gather_in_order(self.accelerator, parts)
        if gathered is None or reasons is None:
            return None, {}
        if reason := next(filter(None, reasons), None):
            self.accelerator.print(f"note: no preview at step {step}: {reason}", flush=True)
            return None, {}
        names = column_names(settings, self.class_names, net.num_classes)
        return self.space.picture(torch.cat(gathered), len(names) or max(1, round(n**0.5)), names), {}

    def summary(self) -> list[str]:
        net, data = self.net, self.data
        condition, names = "no labels", data.class_names
        if net.num_classes is not None:
            condition = f"{net.num_classes} classes ({messages.first_names(names, NAMED_IN_LOG)})"
        elif data.labels is not None and "num_classes" not in self.config.model.args:
            condition += f" (model.args.num_classes=auto would use the {len(names)} classes of the data set)"
        condition = f"prompts of at most {net.max_prompt_bytes} bytes" if net.max_prompt_bytes else condition
        size = sum(p.numel() for p in net.parameters()) / 1e6
        return [
            *(f"note: {note}" for note in [*data.notes, *packing_notes(data), *self.notes]),
            f"data: {self.config.data.name}, {len(data):,} {self.space}; "
            f"model: {self.config.model.name}, {size:.2f} M parameters, {condition}",
        ]

    def next_command(self, folder: Path) -> str:
        prompts = ["--prompts", captions.plain(self.data.class_names[0])] if self.net.max_prompt_bytes else []
        save_dir = files.free_folder(Path("samples") / folder.name)
        some = (self.trained_classes or ())[:MAX_COLUMNS]
        labels = ["--labels", *flags.label_words(some, self.class_names)] if some else []
        sample: list[str | Path] = ["sample.py", "--weights", folder, "--n_samples", "64", "--save_dir", save_dir]
        return f"sample with: {commands.command(*sample, *prompts, *labels)}"

    def _states(self, batch: Batch) -> dict[str, Any]:
        """What a loss that needs them sees of the stored paths of a teacher."""
        if not self.loss.needs_states:
            return {}
        states = distributed.to_device(self.data.states[batch.indices], self.accelerator.device)
        return {"states": states, "state_times": self.data.state_times}

    def _condition(self, batch: Batch, step: int) -> Tensor | None:
        """Labels [b] or tokens [b, L], some of them replaced by the null condition; None for unconditional networks."""
        y = self._encode_condition(batch)
        config = self.config
        if y is None:
            return None
        y = drop_labels(y, batch.rows, config.seed, step, config.train.batch_size, config.flow.label_dropout, self.net.null)
        return distributed.to_device(y, self.accelerator.device)

    def _encode_condition(self, batch: Batch) -> Tensor | None:
        """Labels [b], or tokens [b, L] of captions; the caption of sample id p is a function of (seed, p)."""
        if self.net.max_prompt_bytes:
            return encode_captions(self.net, self.data, batch.indices, batch.sample_ids, "caption", self.config.seed)
        return batch.y if self.net.num_classes is not None else None


def _changes_of_model(before: ModelConfig, now: ModelConfig) -> list[str]:
    """A line for each key of the section `model` that differs, but for that of a flow that becomes a flow map."""
    lines = [f"was trained with model.name={before.name}, here it is {now.name}"] if before.name != now.name else []
    for key in sorted({**before.args, **now.args}.keys() - {"two_times"}):
        if before.args.get(key) != now.args.get(key):
            was, here = before.args.get(key, "its default"), now.args.get(key, "the default")
            lines.append(f"was trained with model.args.{key}={was}, here it is {here}")
    return lines


def build_loss(config: Config) -> FlowLoss:
    """The loss of a configuration. Raises UserError for wrong arguments of it or of its time sampler."""
    flow = config.flow
    with error_context("flow.time_sampler"):
        time_sampler = time_samplers.build(flow.time_sampler, **flow.time_sampler_args)
    with error_context("loss"):
        return losses.build(config.loss.name, paths.build(flow.path), flow.prediction, time_sampler, config.loss.args)


def encode_captions(net: Any, data: DataSet, indices: Sequence[int], positions: Sequence[int], key: str, seed: int) -> Tensor:
    """Tokens [b, L] of captions of the images with these indices; that of position p is a function of (key, seed, p)."""
    assert data.labels is not None
    names = [data.class_names[label] for label in data.labels[indices].tolist()]
    return net.encode([captions.draw(name, generator(key, seed, p)) for name, p in zip(names, positions, strict=True)])


def build_coupling(config: Config, data: DataSet, source: Source, rows: int) -> Coupling:
    """The coupling of source and data that flow.coupling names. Raises UserError where the data do not fit it."""
    flow = config.flow
    with error_context("flow.coupling"):
        choice = couplings.find(flow.coupling)
    if choice.needs_pairs != (config.data.name == "pairs"):
        raise UserError(
            f"flow.coupling={flow.coupling}: with data.name={config.data.name}; set flow.coupling=paired and data.name=pairs, "
            "or neither"
        )
    if choice.one_start and config.data.horizontal_flip:
        raise UserError("data.horizontal_flip=true: a mirrored image does not match its start; set it to false")
    with error_context(f"flow.coupling={flow.coupling}"):
        return couplings.build(flow.coupling, source, config.seed, data.image_shape, rows, flow.coupling_args, data)
