"""Pairs (noise, image) of a trained flow, for reflow and distillation: `python -m scripts.make_pairs --weights runs/mnist ...`.

Pair k is a function of the weights, the settings and k; classes come in turn. `--real_fraction` makes that share of the
pairs from real images, whose noise comes from solving the flow backwards. `--keep_states` also stores states of each path, for
loss.name=trajectory. `--save_dir` gets manifest.json and shards.
Run it again after a kill: whole shards stay, missing or damaged ones are generated again, with a warning.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor
from tqdm import tqdm

from configs import keys, schema
from configs.errors import UserError
from datasets import DataSet, DataSpec, captions
from datasets.images import to_float
from datasets.pairs import Shard, read_manifest, shards_of
from datasets.places import default_root, resolve_path
from datasets.shards import MANIFEST, save_shard, verify_shard
from flow.likelihood import invert
from flow.losses import LOSSES
from flow.model import FlowModel, Network
from flow.noise import gaussian_noise, generator
from flow.runtime import cli, commands, distributed, files, flags, lock, messages
from flow.runtime.errors import CONTINUES, cli_main, error_context, renaming
from flow.runtime.output_dir import check_same_settings, write_missing
from flow.sampling import guide, locate, snapshot, sources
from flow.sampling.conditions import classes_with_images
from flow.sampling.generate import build_velocity, check_finite, index_batches, sample_batch, to_solver_dtype
from flow.sampling.settings import SamplerSettings, build_time_grid, guidance_note, validate
from flow.solvers import DETERMINISTIC
from flow.source import GAUSSIAN, DataSource, Source
from flow.training.checks import check_same_data

EXAMPLES = """\
  python -m scripts.make_pairs --weights runs/mnist_mini_cond --n_pairs 20000 --save_dir runs/pairs --guidance_scale 1.5
  accelerate-launch --multi_gpu --num_processes 8 -m scripts.make_pairs --weights runs/cifar10 --n_pairs 1000000 \\
      --save_dir runs/cifar10_pairs --sampling_method heun --sampling_steps 18 --real_fraction 0.2 -mp auto"""


def parse_args():
    parser = cli.Parser(__doc__, EXAMPLES)
    flags.add_config_flag(parser)
    flags.add_weights_flag(parser)
    flags.add_count_flag(parser, "--n_pairs", "number of pairs", required=True)
    flags.add_output_flag(parser, "--save_dir")
    flags.add_method_flag(parser, DETERMINISTIC, "heun")
    flags.add_count_flag(parser, "--sampling_steps", "steps of the solver", 50)
    flags.add_guidance_flags(parser)
    flags.add_labels_flag(parser)
    parser.add_argument(
        "--real_fraction", type=flags.fraction, default=0.0, help="share of pairs from real images (default: 0)"
    )
    flags.add_count_flag(parser, "--keep_states", "also store N states of each path, for loss.name=trajectory", least=1)
    flags.add_seed_flag(parser, 0)
    flags.add_batch_size_flag(parser)
    flags.add_count_flag(parser, "--shard_pairs", "pairs per file", 1000)
    flags.add_precision_flag(parser)
    return parser.parse()


def main() -> None:
    args = parse_args()
    accelerator = distributed.build_accelerator(args.mixed_precision)  # first: processes agree on a revision of the hub
    snap = snapshot.load(args.weights, args.config, args.overrides)
    distributed.check_same(accelerator, snap.sha256, f"--weights {args.weights}")
    model = snap.model()
    guide_name = guide.attach(model, snap, args.guide_weights)
    inverted = round(args.real_fraction * args.n_pairs)
    spec, data = read_real_images(accelerator, snap, model, needed=inverted > 0)
    class_names = data.class_names if data else snap.class_names
    labels = flags.labels_of(args.labels, snap.class_names)
    if not labels and data:
        labels = trained_classes(snap, data, model.net.num_classes)
    classes, prompts = conditions_of(labels, class_names, model.net)
    settings = SamplerSettings(
        args.sampling_method, args.sampling_steps, args.guidance_scale, seed=args.seed, labels=classes, prompts=prompts,
        guidance_interval=tuple(args.guidance_interval), guide=guide_name,
    )  # fmt: skip
    with args.naming_flags("make_pairs"):
        validate(settings, model)
        invertible_indices: list[int] = []
        if data:
            check_real_images(snap, model.net, spec, data, inverted)
            invertible_indices = indices_to_invert(args, data, labels, inverted)
        times = build_time_grid(settings, model.path)
        kept_steps = states_to_keep(args.keep_states or 0, len(times) - 1)
        if kept_steps and inverted:
            raise ValueError("--keep_states: no path of the flow ends at a real image; not with --real_fraction")
    if note := guidance_note(settings, model):
        accelerator.print(f"note: {note}")
    state_times = [times[k] for k in kept_steps]
    requested = request_of(args, accelerator.mixed_precision, settings.guide, labels, inverted, state_times)
    manifest = {"weights_sha256": snap.sha256, **requested, **described(snap, model.source, class_names, spec)}
    if data and inverted:  # which of them a pair has depends on all
        manifest["real_fingerprint"] = data.fingerprint()
    for network in model.networks:
        distributed.prepare_model(network, accelerator)
    model.eval()
    maker = PairMaker(accelerator, model, data, settings, args.bspp, kept_steps, invertible_indices)
    with lock.folder(args.save_dir, accelerator):
        num_written = write_shards(args, accelerator, json.loads(json.dumps(manifest)), maker.shard)
    train = train_command(locate.pinned(args.weights, snap.path), args.save_dir, snap.config, bool(kept_steps))
    result = f"{args.n_pairs} pairs in {args.save_dir}, {num_written} of them new"
    accelerator.print(messages.summary(result, args.start, f"train on them with: {train}"))


def read_real_images(
    accelerator: Accelerator, snap: snapshot.Snapshot, model: FlowModel, needed: bool
) -> tuple[DataSpec, DataSet | None]:
    """The real images of the training; None, with a note, where they are not here and not `needed`. What a flow between two
    data sets starts from is read, too."""
    spec = DataSpec.of(snap.config.data)
    if isinstance(source := model.source, DataSource):
        snap.check_data()
        with error_context("flow.source"):
            distributed.main_process_first(accelerator, lambda: source.training)
    behind, data = distributed.main_process_first(accelerator, partial(build_or_reason, snap, spec))
    if not distributed.any_process(accelerator, isinstance(data, str)):
        check_same_data(accelerator, behind.name, data)
        return behind, data
    reason = data if isinstance(data, str) else "another process lacks them"
    if needed:
        raise UserError(f"--real_fraction: needs the training images: {reason}")
    classes = "; without --labels they cover all classes, also those without training images" if model.net.num_classes else ""
    accelerator.print(f"note: these pairs are made without the training images ({reason}){classes}")
    return spec, None


def trained_classes(snap: snapshot.Snapshot, data: DataSet, num_classes: int | None) -> tuple[int, ...] | None:
    """The classes that the flow was trained on, where they are not all; those of its own pairs, in a second reflow."""
    config = snap.config.data
    if config.name != "pairs" or num_classes is None:
        return classes_with_images(data.labels, num_classes)
    labels = read_manifest(resolve_path(Path(config.root or default_root()), config.args["path"])).get("labels")
    return tuple(labels) if labels else None


def build_or_reason(snap: snapshot.Snapshot, spec: DataSpec) -> tuple[DataSpec, DataSet | str]:
    """The data set behind `spec`, in a second reflow the real images of the first; or why it is not to be had."""
    try:
        snap.check_data()
        with error_context("data"):
            behind = spec.behind(["pairs"])
            return behind, behind.build()
    except UserError as error:
        return spec, str(error)


def check_real_images(snap: snapshot.Snapshot, net: Network, spec: DataSpec, data, inverted: int) -> None:
    """Raises ValueError for a data set whose images the network does not make, or, where some are to be inverted, whose classes
    or latents are not those of the network."""
    if data.image_shape != snap.image_shape:
        raise ValueError(
            f"data.name={spec.name}: has images of {data.image_shape}, --weights makes {snap.image_shape}; use the "
            "data set of its training"
        )
    if not inverted:
        return
    if net.num_classes is not None and not 0 < len(data.class_names) <= net.num_classes:
        classes_of = f"{len(data.class_names)} classes, the network num_classes={net.num_classes}"
        raise ValueError(f"data: has {classes_of}; use the data set that it was trained on")
    snapshot.check_codec("data", snap, data.codec)


def indices_to_invert(args, data, labels: tuple[int, ...] | None, inverted: int) -> list[int]:
    """The indices of the real images in the order of the inverted pairs. Raises ValueError where there are too few."""
    if not inverted:
        return []
    indices = invertible(data, labels, args.seed)
    if inverted > len(indices):
        raise ValueError(f"--real_fraction {args.real_fraction}: {inverted} pairs of {len(indices)} real images; use less")
    return indices


def conditions_of(
    labels: tuple[int, ...] | None, class_names: Sequence[str], net: Network
) -> tuple[tuple[int, ...] | None, tuple[str, ...] | None]:
    """(labels, prompts) that the pairs get in turn: a network with prompts reads those of the classes. Raises UserError."""
    if not net.max_prompt_bytes:
        return labels, None
    if not class_names:
        raise UserError("data: has no classes, whose names a network with text reads; use the data set that it was trained on")
    classes = labels or tuple(range(len(class_names)))
    if wrong := [label for label in classes if not 0 <= label < len(class_names)]:
        raise UserError(f"--labels {wrong[0]}: the data set has classes 0 to {len(class_names) - 1}")
    return classes, tuple(captions.plain(class_names[label]) for label in classes)


def request_of(
    args, mixed_precision: str, guide_name: str | None, labels: tuple[int, ...] | None, inverted: int, state_times: list[float]
) -> dict[str, Any]:
    """What a manifest says of the flags."""
    return {
        "sampling_method": args.sampling_method,
        "sampling_steps": args.sampling_steps,
        "guidance_scale": args.guidance_scale,
        "guidance_interval": args.guidance_interval,
        "guide": guide_name,
        "seed": args.seed,
        "labels": labels,
        "mixed_precision": mixed_precision,
        "bspp": args.bspp,
        "generated": args.n_pairs - inverted,
        "inverted": inverted,
        "shard_pairs": args.shard_pairs,
        "state_times": state_times,
    }


def described(snap: snapshot.Snapshot, starts: Source, class_names: Sequence[str], real: DataSpec) -> dict[str, Any]:
    """What a manifest says of the flow, which starts at `starts`, and of the real images `real`."""
    source = snap.config.flow.source
    with error_context("flow.source"):
        drawn_from = sources.training_fingerprint(starts)
    return {
        "image_shape": snap.image_shape,
        "class_names": class_names,
        "data": asdict(real),
        **snapshot.network_record(snap.config),
        **({"source": asdict(source)} if source.name != GAUSSIAN else {}),
        **({"codec": snap.codec} if snap.codec else {}),
        **({"source_fingerprint": drawn_from} if drawn_from else {}),
    }


def write_shards(
    args, accelerator: Accelerator, manifest: dict[str, Any], make: Callable[[Shard, tqdm], dict[str, Tensor]]
) -> int:
    """Write the manifest and the shards that are missing or damaged; `make` computes the tensors of one. The number of pairs
    that were written."""
    if accelerator.is_main_process:
        check_output_dir(args.save_dir, manifest)
    accelerator.wait_for_everyone()
    shards = {args.save_dir / shard.name: shard for shard in shards_of(manifest)}

    def write(path: Path, indices: range, bar: tqdm) -> None:
        with files.atomic_file(path) as temporary:
            save_shard(temporary, make(shards[path], bar))

    plan = {path: shard.indices for path, shard in shards.items()}
    return write_missing(accelerator, plan, verify_shard, write, "pairs (of this process)")


def train_command(weights: str, save_dir: Path, config: schema.Config, has_states: bool) -> str:
    """The command that trains the network of these weights on the pairs, from the weights: reflow, or a flow map on paths."""
    same = ["model.name", "model.args", "flow.path", "flow.prediction", "flow.source.name", "flow.source.args"]
    overrides = {key: keys.get(config, key) for key in same} | {
        "data.name": "pairs", "data.args.path": str(save_dir), "flow.coupling": "paired", "flow.label_dropout": 0.0,
        "train.init_from": weights,
    }  # fmt: skip
    if config.flow.source.name != GAUSSIAN and config.data.root:
        overrides["data.root"] = config.data.root
    if config.data.autoencoder:
        overrides["data.autoencoder"] = config.data.autoencoder
    if has_states:
        overrides |= {"loss.name": "trajectory", "model.args": {**config.model.args, "two_times": True}}
    elif config.model.args.get("two_times") and LOSSES[config.loss.name].needs_states:  # a flow does not start from a flow map
        overrides |= {"model.args": {**config.model.args, "two_times": False}}
        del overrides["train.init_from"]
    elif config.model.args.get("two_times"):  # guidance that was trained in is in the pairs
        loss_args = {key: value for key, value in config.loss.args.items() if key not in ("guidance_scale", "guidance_mix")}
        overrides |= {"loss.name": config.loss.name, "loss.args": loss_args}
    if has_states and (config.flow.path, config.flow.prediction) != ("linear", "velocity"):  # of another kind than the weights
        overrides |= {"flow.path": "linear", "flow.prediction": "velocity"}
        del overrides["train.init_from"]
    folder = files.free_folder(save_dir.with_name(f"{save_dir.name}_{'trajectory' if has_states else 'reflow'}"))
    return commands.command("train.py", "-e", folder, *(commands.override(key, value) for key, value in overrides.items()))


def check_output_dir(save_dir: Path, manifest: dict[str, Any]) -> None:
    """Write the manifest, or check that the existing one is of the same pairs.

    Raises:
        UserError: for a folder of another run.
    """
    existing = None
    if (save_dir / MANIFEST).is_file():
        with renaming("data: path=", "--save_dir "), error_context("data"):
            before = read_manifest(save_dir)
        later = ("source_fingerprint", "real_fingerprint", "flow", "model")  # folders of earlier versions have none
        existing = [without_root({key: manifest[key] for key in later if key in manifest} | before)]
    check_same_settings(save_dir, existing, without_root(manifest), "pairs", "make_pairs")
    if existing is None:
        files.write_text(save_dir / MANIFEST, json.dumps(manifest, indent=1))


def without_root(manifest: dict[str, Any]) -> dict[str, Any]:
    """The manifest without the place of the real images, which may change."""
    return {**manifest, "data": {key: value for key, value in manifest["data"].items() if key != "root"}}


def states_to_keep(count: int, steps: int) -> list[int]:
    """The steps, of so many, whose ends are stored: `count` of them between 0 and `steps`, evenly. Raises ValueError where
    there are not so many."""
    if count >= steps:
        raise ValueError(f"--keep_states {count}: a path of {steps} steps has {steps - 1} states between its ends")
    return [round((j + 1) * steps / (count + 1)) for j in range(count)]


def invertible(data, labels: tuple[int, ...] | None, seed: int) -> list[int]:
    """The indices of the real images of these classes, in an order that depends on the seed. Raises ValueError for classes of
    images without labels."""
    order = generator("inverted", seed).permutation(len(data)).tolist()
    if labels is None:
        return order
    if data.labels is None:
        raise ValueError("--labels: the real images of --real_fraction have no labels; leave out one of the two flags")
    return [k for k in order if int(data.labels[k]) in labels]


@dataclass
class PairMaker:
    """Makes the tensors of a shard."""

    accelerator: Accelerator
    model: FlowModel
    data: Any  # the real images
    settings: SamplerSettings
    batch_size: int
    kept_steps: list[int]  # at whose ends the states of a path are stored
    invertible_indices: list[int]  # of real images, in the order of the inverted pairs

    def shard(self, shard: Shard, bar: tqdm) -> dict[str, Tensor]:
        """The tensors of one shard."""
        parts: dict[str, list[Tensor]] = {}
        for batch in index_batches(shard.indices, self.batch_size):
            for name, tensor in (self.inverted(batch) if shard.inverted else self.generated(batch)).items():
                if tensor.is_floating_point():
                    check_finite(tensor, batch)  # in float16
                parts.setdefault(name, []).append(tensor)
            bar.update(len(batch))
        return {name: torch.cat(tensors) for name, tensors in parts.items()}

    @torch.inference_mode()
    def generated(self, batch: range) -> dict[str, Tensor]:
        """images float16, labels int64, and states float16 at the ends of `kept_steps` of the pairs with these indices."""
        states: list[Tensor] = []
        steps = count(1)

        def keep(x: Tensor) -> None:
            if next(steps) in self.kept_steps:
                states.append(x.half().cpu())

        samples = sample_batch(
            self.model, batch, self.settings, self.accelerator.device, self.accelerator.autocast,
            x0=self.model.draw_x0("pairs", self.settings.seed, batch), callback=keep if self.kept_steps else None,
        )  # fmt: skip
        tensors = {"images": samples.x.half().cpu(), **({"states": torch.stack(states, dim=1)} if self.kept_steps else {})}
        return tensors if samples.labels is None else tensors | {"labels": samples.labels}

    @torch.inference_mode()
    def inverted(self, batch: range) -> dict[str, Tensor]:
        """images, labels and float16 noise of the real images that become the inverted pairs `batch`.

        Inverted with the image's own label and without guidance, as a guided flow cannot be solved backwards.
        """
        model, settings, device = self.model, self.settings, self.accelerator.device
        with error_context("data"):
            pixels, labels = zip(*(self.data[k] for k in self.invertible_indices[batch.start : batch.stop]), strict=True)
        x1 = to_float(torch.stack(pixels))
        y = torch.tensor(labels)
        class_names = self.data.class_names
        prompts = tuple(captions.plain(class_names[label]) for label in labels) if model.net.max_prompt_bytes else None
        velocity = build_velocity(model, range(len(y)), SamplerSettings(labels=tuple(labels), prompts=prompts), device)
        noise = None
        if model.source.name == GAUSSIAN:
            noise = to_solver_dtype(gaussian_noise("inversion", settings.seed, batch, self.data.image_shape), device)
        with self.accelerator.autocast():
            x0 = invert(velocity, to_solver_dtype(x1, device), noise, settings.steps, settings.method)
        tensors = {"images": x1.half(), "noise": x0.half().cpu()}
        return tensors | {"labels": y} if model.net.null is not None else tensors


if __name__ == "__main__":
    cli_main(main, CONTINUES)
