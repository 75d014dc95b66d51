"""Snapshots: averaged weights that carry their configuration, in one safetensors file, for sampling.

A snapshot may come from a stranger. Its header is checked before anything is built of it, sizes against the tensors of the
file; it resolves no interpolation; and the places that it names (data.root, paths among data.args, the autoencoder) are used
only where the file lies in a run folder or the command line repeats them.
"""

import json
import os
import re
import shlex
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from configs import schema, stored
from configs.schema import Config, UserError
from flow import path as paths
from flow.engine import checkpoint, files, header, runtime, seal
from flow.guidance import FlowModel, Network

Description = dict[str, Any]


@dataclass
class Snapshot:
    path: Path
    config: Config
    image_shape: tuple[int, ...]
    step: int
    images: int  # training images seen
    half_life_images: int  # of the moving average
    weights: dict[str, Tensor]
    codec: Description | None = None  # of a flow on latents: the autoencoder that decodes them, see models/autoencoder.py
    class_names: tuple[str, ...] = ()  # of the labels that the network was trained with
    unconfirmed: dict[str, Any] = field(default_factory=dict)  # {key: value} that the header names and nobody has repeated

    @property
    def decoded_shape(self) -> tuple[int, ...]:
        """Of the images that come out in the end; `image_shape` is that of what the network sees."""
        return tuple(self.codec["image_shape"]) if self.codec else self.image_shape

    def model(self, build: Callable[..., Any], codec: Callable[[Description], Any] | None = None) -> FlowModel:
        """The network with these weights, its path, prediction and decoder; `build(name, image_shape, args)` makes the
        network, `codec(description)` the decoder, for those who look at images.

        Raises UserError where the weights do not fit, and for an autoencoder that is not that of the training.
        """
        model = self.config.model
        self._refuse_unconfirmed(lambda key: key.split(".")[0] in ("model", "flow"))
        with runtime.blame("model"):
            build_net = partial(build, model.name, self.image_shape, model.args)
            net = header.build_within(self.weights, self.image_shape, model.args, build_net, self.check_fit)
        self.load_into(net)
        if self.codec and codec:
            self._refuse_unconfirmed(lambda key: key == "data.autoencoder")
        return flow_model(net, self.config, self.codec, codec)

    def load_into(self, net: nn.Module) -> None:
        """Raises UserError that names the first weight that does not fit."""
        self.check_fit(net)
        net.load_state_dict(self.weights)

    def check_fit(self, net: nn.Module) -> None:
        """Raises UserError that names the first weight whose shape or kind is not that of the network."""
        expected = {name: _kind_of(value) for name, value in net.state_dict().items()}
        actual = {name: _kind_of(value) for name, value in self.weights.items()}
        for name in sorted(expected.keys() | actual.keys()):
            if actual.get(name, "absent") != expected.get(name, "absent"):
                raise UserError(
                    f"--weights {self.path}: do not fit the model of the configuration: {name} is "
                    f"{actual.get(name, 'absent')} in the file, {expected.get(name, 'absent')} in "
                    f"model.name={self.config.model.name} with model.args={self.config.model.args}"
                )

    def check_data(self) -> None:
        """For those who are about to read the data of the training.

        Raises UserError where the header alone says where they lie.
        """
        self._refuse_unconfirmed(lambda key: key.split(".")[0] == "data" and key != "data.autoencoder")

    def _refuse_unconfirmed(self, concerns: Callable[[str], bool]) -> None:
        for key, value in self.unconfirmed.items():
            if not concerns(key):
                continue
            if "${" in str(value):
                raise UserError(f"--weights {self.path}: {stored.refusal(key, value)}")
            again = shlex.quote(f"{key}={value}")
            raise UserError(
                f"--weights {self.path}: lies in no run folder, so the place {key}={value} in it is used only where the "
                f"command line repeats it; add {again}, or another place"
            )


def _kind_of(value: Tensor) -> tuple[int, ...] | str:
    shape = tuple(value.shape)
    return shape if value.is_floating_point() else f"{value.dtype} {shape}"


def flow_model(
    net: Network, config: Config, description: Description | None = None, codec: Callable[[Description], Any] | None = None
) -> FlowModel:
    """The network with what the configuration says of its path and prediction, and the decoder that codec(description) makes
    where there is a description. Raises UserError for unknown names and an autoencoder that is not that of the description.
    """
    with runtime.blame("flow.path"):
        chosen = paths.build(config.flow.path)
    if config.flow.prediction not in paths.PREDICTIONS:
        raise UserError(f"flow.prediction={config.flow.prediction}: must be one of {', '.join(paths.PREDICTIONS)}")
    if description is None or codec is None:
        return FlowModel(net, chosen, config.flow.prediction)
    moved = {"source": config.data.autoencoder} if config.data.autoencoder else {}
    with runtime.blame("data.autoencoder" if moved else "the autoencoder (data.autoencoder can name another place)"):
        return FlowModel(net, chosen, config.flow.prediction, codec({**description, **moved}).decode)


def check_codec(key: str, weights: Snapshot, description: Description | None) -> None:
    """Raises UserError where the weights were trained on latents of another autoencoder than the data now are of."""
    compared = ("digest", "shift", "scale")
    theirs, ours = ({k: d[k] for k in compared} if d else None for d in (weights.codec, description))
    if theirs != ours:
        was, now = (f"latents of the autoencoder {d['digest'][:12]}" if d else "no latents" for d in (theirs, ours))
        scaled = " with another shift and scale" if was == now else ""
        raise UserError(f"{key}: {weights.path} was trained on {was}, the data are {now}{scaled}")


def save(
    path: Path,
    weights: dict[str, Tensor],
    config: Config,
    image_shape: tuple[int, ...],
    step: int,
    half_life_images: int,
    codec: Description | None = None,
    class_names: Sequence[str] = (),
) -> None:
    """Write a snapshot, whole or not at all."""
    metadata = {
        "config": schema.dump(config),
        "image_shape": json.dumps(image_shape),
        "step": str(step),
        "images": str(step * config.train.batch_size),
        "half_life_images": str(half_life_images),
        **({"codec": json.dumps(codec)} if codec else {}),
        **({"class_names": json.dumps(list(class_names))} if class_names else {}),
        seal.KEY: seal.BLANK,
    }
    with files.atomic_file(path) as temporary:
        save_file({name: value.detach().cpu().contiguous() for name, value in weights.items()}, temporary, metadata=metadata)
        seal.seal(temporary)


def publish(saved: Path, folder: Path, step: int, half_lives: list[int], keep: int) -> None:
    """Give the averages inside the checkpoint `saved` a second name in `folder`, kept when the checkpoint goes.

    The first half-life is step_XXXXXXXX.safetensors, others step_XXXXXXXX.ema_<half-life>.safetensors. Of each, the
    newest `keep` stay; 0 keeps all.
    """
    for name in checkpoint.ema_files(half_lives):
        suffix = name.removeprefix("ema").removesuffix(".safetensors").lstrip("_")
        tail = f".ema_{suffix}.safetensors" if suffix else ".safetensors"
        with files.atomic_file(folder / f"step_{step:08d}{tail}") as temporary:
            try:
                os.link(saved / name, temporary)
            except OSError:  # a file system without hard links
                shutil.copyfile(saved / name, temporary)
        for old in _by_step(folder, tail)[:-keep] if keep else []:
            old.unlink()


def load(weights: str | Path, config_path: str | None = None, overrides: list[str] | None = None) -> Snapshot:
    """The snapshot behind `--weights`: a run folder, a checkpoint folder or a .safetensors file.

    `config_path` (-c) replaces the stored configuration, overrides change it. Raises UserError for a path that holds no
    snapshot and for a damaged file.
    """
    path = find(Path(weights))
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    except (SafetensorError, OSError) as error:
        raise UserError(f"--weights {path}: not a whole safetensors file ({error})") from None
    missing = header.KEYS - metadata.keys()
    if missing:
        raise UserError(f"--weights {path}: not a snapshot of this project: its header lacks {', '.join(sorted(missing))}")
    carried, actual = seal.digests(path)
    if carried not in (None, actual):
        raise UserError(f"--weights {path}: has changed since it was written (its digest does not fit)")
    try:
        image_shape, counts, codec, class_names = header.read(metadata)
    except ValueError as error:
        raise UserError(f"--weights {path}: not a snapshot of this project: its header is broken ({error})") from None
    if name := first_nonfinite(tensors):
        raise UserError(f"--weights {path}: {name} holds numbers that are not finite; nothing can be sampled from it")
    config, unconfirmed = _configuration(path, metadata["config"], config_path, overrides, codec)
    return Snapshot(path, config, image_shape, *counts, tensors, codec, class_names, unconfirmed)


def first_nonfinite(tensors: Mapping[str, Tensor]) -> str | None:
    """The name of the first tensor that holds NaN or infinity, in alphabetical order."""
    return next((name for name in sorted(tensors) if not torch.isfinite(tensors[name]).all()), None)


def _configuration(
    path: Path, text: str, config_path: str | None, overrides: list[str] | None, codec: Description | None
) -> tuple[Config, dict[str, Any]]:
    """The configuration of a snapshot, and the places that its header names and the command line does not."""
    source, given = f"--weights {path}", schema.overridden(overrides)
    unconfirmed: dict[str, Any] = {}
    base, places = schema.parse_parts(text, source, Config, given)
    if config_path:
        config = schema.load(config_path, overrides)
    else:
        unconfirmed = places
        if not _in_run_folder(path):
            unconfirmed |= header.take_places(base.data, given)
        config = schema.load(None, overrides, base=base)
        if config.data.name != base.data.name:  # its arguments are those of the command line
            unconfirmed = {key: value for key, value in unconfirmed.items() if not key.startswith("data.args")}
        config.typed |= {tuple(key.split(".")): value for key, value in unconfirmed.items()}  # a copy keeps them
    schema.keep_auto_classes(config, base)
    if codec and not config.data.autoencoder and not _in_run_folder(path):
        unconfirmed.setdefault("data.autoencoder", codec["source"])
    return config, unconfirmed


def _in_run_folder(path: Path) -> bool:
    """Whether the file lies where a run keeps its snapshots and checkpoints: such a folder counts as the user's own."""
    folder = path.resolve().parent
    if folder.name != "snapshots":
        folder = folder.parent
    return folder.name in ("snapshots", "checkpoints") and (folder.parent / "config.yaml").is_file()


def find(path: Path) -> Path:
    """The snapshot file that a run folder (its newest), a checkpoint folder or a file stands for."""
    if path.is_file():
        return path
    if not path.exists():
        raise UserError(f"--weights {path}: there is no such file or folder")
    found = _by_step(path / "snapshots") or _by_step(path) or sorted(path.glob(checkpoint.EMA_FILE))
    if found:
        return found[-1]
    raise UserError(f"--weights {path}: holds no snapshot; give a run folder, a checkpoint folder or a .safetensors file")


def _by_step(folder: Path, tail: str = ".safetensors") -> list[Path]:
    """Files step_<number><tail>, oldest first."""
    named = ((re.fullmatch(rf"step_(\d{{8,}}){re.escape(tail)}", p.name), p) for p in folder.glob(f"step_*{tail}"))
    return [p for _, p in sorted((int(match.group(1)), p) for match, p in named if match)]
