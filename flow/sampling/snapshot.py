"""Snapshots: averaged weights that carry their configuration, in one safetensors file, for sampling.

A snapshot may come from a stranger. Its header is checked before anything is built of it, sizes against the tensors of the
file; it resolves no interpolation; and the places that it names (data.root, paths among data.args, the autoencoder) are used
only where the file lies in a run folder or the command line repeats them. A snapshot of the Hugging Face hub is a stranger's.
"""

import dataclasses
import json
import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

import models
from configs import loading, schema, stored
from configs.errors import UserError
from configs.schema import Config
from flow import path as paths
from flow.model import FlowModel, Network
from flow.registry import is_finite_number
from flow.runtime import files
from flow.runtime.errors import error_context
from flow.sampling import digest, header, hub, locate, sources
from flow.sampling.bounded_build import build_within
from flow.sampling.header import PowerAverage
from flow.sampling.space import Space

CodecSpec = dict[str, Any]
FileIdentity = tuple[int, int, int]  # inode, modification time in ns, size in bytes

FLAGS = {  # by the last word of a key of trainings: what to give instead where weights are used
    "seed": "--seed", "mixed_precision": "-mp", "compile": "--compile", "batch_size": "--bspp", "n_samples": "--n_samples",
    "sampling_steps": "--sampling_steps", "guidance_scale": "--guidance_scale",
}  # fmt: skip


@dataclass
class Snapshot:
    path: Path
    identity: FileIdentity  # of the file that was read
    config: Config
    image_shape: tuple[int, ...]
    step: int
    images: int  # training images seen
    half_life_images: int  # of the moving average; 0 for a power-function average
    weights: dict[str, Tensor]
    codec: CodecSpec | None = None  # of a flow on latents: the autoencoder that decodes them, see models/autoencoder.py
    class_names: tuple[str, ...] = ()  # of the labels that the network was trained with
    power_average: PowerAverage | None = None  # which one, if the weights are one
    unconfirmed: dict[str, Any] = field(default_factory=dict)  # {key: value} that the header names and nobody has repeated

    def title(self, weights: str | Path) -> str:
        """What a table calls the snapshot behind `weights`: digits@2000, after the run folder, the file or the repository."""
        return f"{locate.name_of(weights)}@{self.step}"

    @cached_property
    def sha256(self) -> str:
        """SHA-256 of the file that was read. Raises UserError where another file has replaced it since."""
        value = files.sha256(self.path)
        if self.identity != _identity(self.path):
            raise UserError(f"--weights {self.path}: was replaced while it was in use; start this command again")
        return value

    @property
    def decoded_shape(self) -> tuple[int, ...]:
        """The shape of the images that come out in the end; `image_shape` is that of what the network sees."""
        return self.space.decoded_shape

    @property
    def space(self) -> Space:
        """What the network sees: pixels, latents or points."""
        return Space(self.image_shape, self.codec)

    def model(self, decode: bool = True) -> FlowModel:
        """The network with these weights, its path and prediction and, with `decode`, decoder and encoder of latents.

        Raises:
            UserError: where the weights do not fit, and for an autoencoder that is not that of the training.
        """
        model = self.config.model
        self._refuse_unconfirmed(lambda key: key.split(".")[0] in ("model", "flow"))
        with error_context("model"):
            build_net = partial(models.build, model.name, self.image_shape, model.args)
            net = build_within(self.weights, self.image_shape, model.args, build_net, self.check_fit)
        self.load_into(net)
        if self.codec and decode:
            self._refuse_unconfirmed(lambda key: key == "data.autoencoder")
        return flow_model(net, self.image_shape, self.config, self.codec if decode else None)

    def load_into(self, net: nn.Module) -> None:
        """Load the weights into the network. Raises UserError as `check_fit`."""
        self.check_fit(net)
        net.load_state_dict(self.weights)

    def check_fit(self, net: nn.Module, weights: Mapping[str, Tensor] | None = None) -> None:
        """Raises UserError that names the first of the weights (default: those of the snapshot) whose shape or kind is not that
        of the network."""
        expected = {name: _kind_of(value) for name, value in net.state_dict().items()}
        actual = {name: _kind_of(value) for name, value in (self.weights if weights is None else weights).items()}
        for name in sorted(expected.keys() | actual.keys()):
            if actual.get(name, "absent") != expected.get(name, "absent"):
                raise UserError(
                    f"--weights {self.path}: do not fit the network (model.name, model.args): {name} is "
                    f"{actual.get(name, 'absent')} in the file, {expected.get(name, 'absent')} in the network"
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


def flow_model(net: Network, shape: tuple[int, ...], config: Config, codec: CodecSpec | None = None) -> FlowModel:
    """The network, which sees x of this shape, with path and prediction of the configuration, and decoder and encoder of
    `codec`, if any.

    Raises:
        UserError: for unknown names, and an autoencoder that is not the one of `codec`.
    """
    with error_context("flow.path"):
        path = paths.build(config.flow.path)
    with error_context("flow.source"):
        source = sources.build(config.flow.source.name, config.data.root, config.flow.source.args)
    guidance = config.loss.args.get("guidance_scale", 1.0)
    if not is_finite_number(guidance) or guidance <= 0:
        raise UserError(f"loss.args.guidance_scale={guidance}: must be more than 0; 1 is off")
    model = FlowModel(
        net, path, shape, prediction=config.flow.prediction, trained_guidance=guidance,
        null_is_trained=config.flow.label_dropout > 0, source=source, coupling=config.flow.coupling,
    )  # fmt: skip
    if codec is None:
        return model
    override = {"source": config.data.autoencoder} if config.data.autoencoder else {}
    with error_context("data.autoencoder" if override else "the autoencoder (data.autoencoder can name another place)"):
        autoencoder = models.build_codec({**codec, **override})
    return replace(model, decode=autoencoder.decode, encode=autoencoder.to_latents)


def check_codec(key: str, weights: Snapshot, codec: CodecSpec | None) -> None:
    """Raises UserError where the weights were trained on latents of another autoencoder than `codec`."""
    compared = ("digest", "shift", "scale")
    actual, expected = ({k: spec[k] for k in compared} if spec else None for spec in (weights.codec, codec))
    if actual != expected:
        trained, data = (
            f"latents of the autoencoder {spec['digest'][:12]}" if spec else "no latents" for spec in (actual, expected)
        )
        scaled = " with another shift and scale" if trained == data else ""
        raise UserError(f"{key}: {weights.path} was trained on {trained}, the data are {data}{scaled}")


def save(
    path: Path,
    weights: dict[str, Tensor],
    config: Config,
    image_shape: tuple[int, ...],
    step: int,
    half_life_images: int,
    codec: CodecSpec | None = None,
    class_names: Sequence[str] = (),
    power_average: PowerAverage | None = None,
) -> None:
    """Write a snapshot, whole or not at all."""
    metadata = {
        "config": loading.dump(config),
        "image_shape": json.dumps(image_shape),
        "step": str(step),
        "images": str(step * config.train.batch_size),
        "half_life_images": str(half_life_images),
        **({"codec": json.dumps(codec)} if codec else {}),
        **({"class_names": json.dumps(list(class_names))} if class_names else {}),
        **({"power_average": json.dumps(power_average._asdict())} if power_average else {}),
        digest.KEY: digest.BLANK,
    }
    with files.atomic_file(path) as temporary:
        save_file({name: value.detach().cpu().contiguous() for name, value in weights.items()}, temporary, metadata=metadata)
        digest.seal(temporary)


def load(weights: str | Path, config_path: str | None = None, overrides: list[str] | None = None) -> Snapshot:
    """The snapshot behind `--weights`: a run folder, a checkpoint folder, an exported folder, a .safetensors file or
    hf:owner/name[@revision] on the Hugging Face hub.

    In a process group every process calls it, unless `weights` is a file. `config_path` (-c) replaces the stored configuration,
    overrides change it. Raises UserError for a path that holds no snapshot, for a damaged file or one that is replaced
    meanwhile, and for what `hub.download` refuses.
    """
    path = locate.find(weights)
    identity = _identity(path)
    metadata = read_header(path)
    tensors = read_weights(path)
    if identity != _identity(path):
        raise UserError(f"--weights {path}: was replaced while it was read; start this command again")
    try:
        image_shape, counts, codec, class_names = header.read(metadata)
        power_average = header.power_average(metadata)
    except ValueError as error:
        raise UserError(f"--weights {path}: not a snapshot of this project: its header is broken ({error})") from None
    own = not hub.is_reference(weights) and locate.run_of(path) is not None
    config, unconfirmed = _configuration(path, own, metadata["config"], config_path, overrides, codec)
    return Snapshot(path, identity, config, image_shape, *counts, tensors, codec, class_names, power_average, unconfirmed)


def read_header(path: Path) -> dict[str, str]:
    """The entries of a snapshot's header, as text. Raises UserError for a file that is not a snapshot."""
    with _whole_file(path) as file:
        metadata = file.metadata() or {}
    missing = header.KEYS - metadata.keys()
    if missing:
        raise UserError(f"--weights {path}: not a snapshot of this project: its header lacks {', '.join(sorted(missing))}")
    return metadata


def read_weights(path: Path) -> dict[str, Tensor]:
    """The tensors of a snapshot. Raises UserError for a file that is damaged or holds numbers that are not finite."""
    with _whole_file(path) as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    carried, actual = digest.stored_and_actual(path)
    if carried not in (None, actual):
        raise UserError(f"--weights {path}: has changed since it was written (its digest does not fit)")
    if name := first_nonfinite(tensors):
        raise UserError(f"--weights {path}: {name} holds numbers that are not finite; nothing can be sampled from it")
    return tensors


@contextmanager
def _whole_file(path: Path) -> Iterator[Any]:
    """A safetensors file to read from. Raises UserError where it is damaged."""
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except (SafetensorError, OSError) as error:
        raise UserError(f"--weights {path}: not a whole safetensors file ({error})") from None


def network_record(config: Config) -> dict[str, Any]:
    """What a configuration says about the samples of given weights: the network, its path, prediction and source."""
    flow = config.flow
    return {
        "flow": {"path": flow.path, "prediction": flow.prediction, "source": dataclasses.asdict(flow.source)},
        "model": dataclasses.asdict(config.model),
    }


def first_nonfinite(tensors: Mapping[str, Tensor]) -> str | None:
    """The name of the first tensor that holds NaN or infinity, in alphabetical order."""
    return next((name for name in sorted(tensors) if not torch.isfinite(tensors[name]).all()), None)


def _configuration(
    path: Path, own: bool, text: str, config_path: str | None, overrides: list[str] | None, codec: CodecSpec | None
) -> tuple[Config, dict[str, Any]]:
    """The configuration of a snapshot, and the places that its header names and neither the command line nor, as the file is
    the user's `own`, the run folder confirms."""
    source = f"--weights {path}"
    typed = loading.overridden(overrides)
    unconfirmed: dict[str, Any] = {}
    base, places = loading.parse_parts(text, source, Config, typed)
    if key := next((key for key in typed if key.split(".")[0] not in schema.OF_WEIGHTS), None):
        flag = FLAGS.get(key.rpartition(".")[2])
        instead = f"; sample.py and evaluate.py have {flag}" if flag else ""
        raise UserError(f"{key}={typed[key]}: is a key of trainings without effect here{instead}")
    if config_path:
        config = loading.load(config_path, overrides)
    else:
        unconfirmed = places
        if not own:
            unconfirmed |= header.take_places(base, typed)
        config = loading.load(None, overrides, base=base)
        if config.data.name != base.data.name:  # its arguments are those of the command line
            unconfirmed = {key: value for key, value in unconfirmed.items() if not key.startswith("data.args")}
        config.typed |= {tuple(key.split(".")): value for key, value in unconfirmed.items()}  # a copy keeps them
    schema.keep_auto_classes(config, base)
    if codec and not config.data.autoencoder and not own:
        unconfirmed.setdefault("data.autoencoder", codec["source"])
    return config, unconfirmed


def _identity(path: Path) -> FileIdentity:
    status = path.stat()
    return status.st_ino, status.st_mtime_ns, status.st_size


def _kind_of(value: Tensor) -> tuple[int, ...] | str:
    shape = tuple(value.shape)
    return shape if value.is_floating_point() else f"{value.dtype} {shape}"
