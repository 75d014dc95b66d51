"""Checks that configuration, data and network fit together, before a training starts."""

from collections.abc import Sequence
from typing import Any

import torch
from accelerate import Accelerator

from configs import keys
from configs.errors import UserError, first_line
from configs.schema import Config
from datasets import DataSet, captions, sample_digest
from flow.losses import FlowLoss
from flow.model import FlowModel
from flow.runtime import distributed, messages
from flow.runtime.errors import error_context
from flow.sampling.space import Space
from flow.source import GAUSSIAN

SAME_FLOW = ("flow.path", "flow.prediction")  # keys that decide what the output of a network means


def check_same_data(accelerator: Accelerator, name: str, data: DataSet) -> str:
    """The `sample_digest` of the data. Raises UserError, on all processes, where one cannot read the samples, or sees other
    samples or classes."""
    digest, reason = "", ""
    try:
        digest = sample_digest(data)
    except (ValueError, OSError) as error:
        reason = first_line(error)
    if distributed.any_process(accelerator, bool(reason)):
        raise UserError(f"data: {reason or 'another process cannot read them'}")
    distributed.check_same(accelerator, [digest, list(data.class_names)], f"data.name={name}, its samples or classes")
    return digest


def check_encodable(name: str, data) -> None:
    """Raises UserError for a data set that holds no uint8 images, which autoencoders are trained on and encode."""
    if not Space(data.image_shape, data.codec).is_pixels:
        raise UserError(f"data.name={name}: holds no images; use mnist, folder or another set of pixels")
    if data.access == "memory" and data.images.dtype != torch.uint8:  # those of files are uint8
        kind = str(data.images.dtype).removeprefix("torch.")
        raise UserError(
            f"data.name={name}: holds images as {kind}, an autoencoder takes uint8; use the data set that they were made from"
        )


def check_source(config: Config, model: FlowModel) -> None:
    """Raises UserError for a source that is a data set where the flow needs noise, and for one of another space."""
    if model.source.name == GAUSSIAN:
        return
    key = f"flow.source.name={model.source.name}"
    if (config.flow.path, config.flow.prediction) != ("linear", "velocity"):
        raise UserError(f"{key}: needs flow.path=linear and flow.prediction=velocity; DDPM starts at Gaussian noise")
    if (data_std := getattr(model.net, "data_std", None)) is not None:
        raise UserError(f"model.args.data_std={data_std}: scales inputs for a start at Gaussian noise; leave it out with {key}")
    with error_context("flow.source"):
        model.draw_x0("train", config.seed, [0])


def check_same_flow(key: str, before: Config, now: Config) -> None:
    """Raises UserError where weights of the configuration `before` put out something else than those of `now`."""
    for name in SAME_FLOW:
        if (was := keys.get(before, name)) != (here := keys.get(now, name)):
            raise UserError(f"{key}: was trained with {name}={was}, here it is {here}; set {name}={was}, or use other weights")


def check_loss(config: Config, loss: FlowLoss, net: Any, data) -> None:
    """Raises UserError where the loss needs what network or data do not have."""
    name = f"loss.name={config.loss.name}"
    if loss.needs_two_times and not net.two_times:
        raise UserError(f"{name}: needs a network with two times; set model.args.two_times=true")
    if net.two_times and not loss.needs_two_times:
        raise UserError(
            f"model.args.two_times=true: {name} trains one time, and sampling would use two; set it to false (a flow map can "
            "start from the flow by train.init_from), or choose a loss of flow maps such as mean_flow"
        )
    if loss.needs_states and not getattr(data, "state_times", ()):
        raise UserError(f"{name}: needs pairs with the paths that lead to them; make them with make_pairs --keep_states 8")
    if loss.needs_pairs and config.data.name != "pairs":
        raise UserError(f"{name}: needs pairs of a flow, made by make_pairs (data.name=pairs, flow.coupling=paired)")
    for key, off in (("guidance_scale", 1), ("guidance_mix", 0)):
        if (value := getattr(loss, key, off)) != off and net.null is None:
            raise UserError(f"loss.args.{key}={value}: needs a network with labels (model.args.num_classes) or prompts")
    scale = getattr(loss, "guidance_scale", 1)
    dropout = config.flow.label_dropout
    if scale != 1 and not dropout:  # guidance_mix alone takes nothing from the null label
        null = "prompt" if net.max_prompt_bytes else "label"
        raise UserError(
            f"flow.label_dropout={dropout:g}: loss.args.guidance_scale={scale} needs a null {null} that is trained; set "
            "flow.label_dropout above 0, such as 0.1"
        )


def check_same_classes(key: str, before: Sequence[str], now: Sequence[str]) -> None:
    """Raises UserError where a run whose classes are known, the names `before`, resumes with data of other classes."""
    if not before or tuple(before) == tuple(now):
        return
    added, missing = ([name for name in names if name not in others] for names, others in ((now, before), (before, now)))
    steps = [f"{verb} {messages.first_names(names)}" for verb, names in (("remove", added), ("restore", missing)) if names]
    has = messages.first_names(now) or "none"
    raise UserError(
        f"{key}: the run was trained with the classes {messages.first_names(before)}; the data set has {has} now: "
        f"{' and '.join(steps) or 'restore their order'}, or start a new run"
    )


def check_conditioning(data, net: Any, resuming: bool = False) -> None:
    """A network with labels or prompts needs a data set that has classes, and room for each class or caption.

    resuming: the network is that of an earlier run, so that only the data can change.
    """
    if net.max_prompt_bytes:
        if not data.class_names or data.labels is None:
            raise UserError(
                f"model.args.max_prompt_bytes={net.max_prompt_bytes}: the data set has no classes to make captions of"
            )
        longest = captions.longest(data.class_names)
        if longest > net.max_prompt_bytes:
            raise UserError(
                f"model.args.max_prompt_bytes={net.max_prompt_bytes}: captions have up to {longest} bytes; use {longest}"
            )
    num_classes = net.num_classes
    if num_classes is None:
        return
    if data.labels is None:
        raise UserError(f"model.args.num_classes={num_classes}: the data set has no labels; use null")
    needed = int(data.labels.max()) + 1
    if num_classes < needed:
        remedy = "remove those that the run did not have, or start a new run" if resuming else f"use {needed}"
        raise UserError(f"model.args.num_classes={num_classes}: the data set has {needed} classes; {remedy}")
