"""Snapshots: averaged weights that carry their configuration, in one safetensors file, for sampling."""

import json
import os
import re
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from configs import schema
from configs.schema import Config, UserError
from flow import path as paths
from flow.engine import checkpoint, files, runtime, seal
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

    @property
    def decoded_shape(self) -> tuple[int, ...]:
        """Of the images that come out in the end; `image_shape` is that of what the network sees."""
        return tuple(self.codec["image_shape"]) if self.codec else self.image_shape

    def model(self, build: Callable[..., Any], codec: Callable[[Description], Any] | None = None) -> FlowModel:
        """The network with these weights, its path, prediction and decoder; `build(name, image_shape, args)` makes the
        network, `codec(description)` the decoder, for those who look at images.

        Raises UserError where the weights do not fit, and for an autoencoder that is not that of the training.
        """
        with runtime.blame("model"):
            net = build(self.config.model.name, self.image_shape, self.config.model.args)
        self.load_into(net)
        return flow_model(net, self.config, self.codec, codec)

    def load_into(self, net: nn.Module) -> None:
        """Raises UserError that names the first weight that does not fit."""
        fits = {name: tuple(value.shape) for name, value in net.state_dict().items()}
        for name in sorted(fits.keys() | self.weights.keys()):
            theirs = tuple(self.weights[name].shape) if name in self.weights else "absent"
            ours = fits.get(name, "absent")
            if theirs != ours:
                raise UserError(
                    f"--weights {self.path}: do not fit the model of the configuration: {name} is {theirs} in the file, "
                    f"{ours} in model.name={self.config.model.name} with model.args={self.config.model.args}"
                )
        net.load_state_dict(self.weights)


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
    header = {
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
        save_file({name: value.detach().cpu().contiguous() for name, value in weights.items()}, temporary, metadata=header)
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
            header = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    except (SafetensorError, OSError) as error:
        raise UserError(f"--weights {path}: not a whole safetensors file ({error})") from None
    missing = {"config", "image_shape", "step", "images", "half_life_images"} - header.keys()
    if missing:
        raise UserError(f"--weights {path}: not a snapshot of this project: its header lacks {', '.join(sorted(missing))}")
    carried, actual = seal.digests(path)
    if carried not in (None, actual):
        raise UserError(f"--weights {path}: has changed since it was written (its digest does not fit)")
    stored = schema.parse(header["config"], source=f"--weights {path}")
    config = schema.load(config_path, overrides) if config_path else schema.load(None, overrides, base=stored)
    schema.keep_auto_classes(config, stored)
    try:
        image_shape = tuple(int(side) for side in json.loads(header["image_shape"]))
        step, images, half_life_images = (int(header[name]) for name in ("step", "images", "half_life_images"))
        codec = json.loads(header["codec"]) if "codec" in header else None
        class_names = json.loads(header.get("class_names", "[]"))
        if not isinstance(class_names, list) or not all(isinstance(name, str) for name in class_names):
            raise ValueError("class_names is not a list of names")
    except (ValueError, TypeError) as error:
        raise UserError(f"--weights {path}: not a snapshot of this project: its header is broken ({error})") from None
    return Snapshot(path, config, image_shape, step, images, half_life_images, tensors, codec, tuple(class_names))


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
