"""A snapshot as a folder in the form of the Hugging Face hub: weights, configuration, model card, a picture of samples."""

import copy
import re
import shlex
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from configs import loading, schema
from configs.errors import UserError
from datasets import captions
from flow.runtime import commands, files, lock, messages, step_names
from flow.runtime.errors import error_context
from flow.sampling import header, hub, images, locate, snapshot
from flow.sampling.conditions import column_names, preview_settings
from flow.sampling.sampler import Sampler
from flow.sampling.snapshot import Snapshot
from flow.source import GAUSSIAN

PLACEHOLDER = "PATH_OF_THIS_FOLDER"  # what a card names as weights before it is uploaded
UNKNOWN = "unknown"  # the license of an export whose user names none
DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
_LICENSE = re.compile(r"[a-z0-9][a-z0-9.+-]*")


def write_weights(path: Path, snap: Snapshot, dtype: str) -> None:
    """Write the snapshot with its floating-point weights in this precision, a key of DTYPES, and the same header.

    Raises:
        UserError: for weights beyond the range of fp16.
    """
    weights = {}
    for name, value in snap.weights.items():
        weights[name] = value.to(DTYPES[dtype]) if value.is_floating_point() else value
        if not torch.isfinite(weights[name]).all():
            raise UserError(f"--weights {snap.path}: {name} has values beyond the range of {dtype}; use --dtype bf16")
    snapshot.save(
        path, weights, snap.config, snap.image_shape, snap.step, snap.half_life_images, snap.codec, snap.class_names,
        snap.power_average,
    )  # fmt: skip


def check_license(name: str) -> None:
    """Raises UserError for anything but the identifier of a license on the hub."""
    if not _LICENSE.fullmatch(name):
        raise UserError(f"--license {name}: must be an identifier of the Hugging Face hub, e.g. mit, cc-by-4.0, other")


def write_folder(folder: Path, snap: Snapshot, dtype: str, license_name: str, shown: str) -> bool:
    """Write the folder, whole or not at all; False where it is there already. Its model card, which may have been edited, then
    stays as it is, but for the weights in its command, which become `shown`.

    Args:
        dtype: a key of DTYPES.
        license_name: of the weights, see `check_license`; UNKNOWN leaves the license of a card that is there.
        shown: what the command in the card names as weights.

    Raises:
        UserError: for a folder with something else, and settings of the preview that do not go with the network.
    """
    if folder.is_file():
        raise UserError(f"--to {folder}: is a file; name a folder")
    with lock.unfinished(folder) as new:
        write_weights(new / hub.WEIGHTS_FILE, snap, dtype)
        files.write_text(new / "config.yaml", loading.dump(snap.config))
        _write_picture(new / "samples.png", snap)
        files.write_text(new / hub.CARD, card(snap, dtype, license_name, shown))
        if not folder.exists() or files.is_empty_dir(folder):
            files.atomic_rename_dir(new, folder)
            return True
        existing = {path.name: path for path in folder.iterdir()}
        same = existing.keys() == set(hub.FILES) and all(
            files.sha256(path) == files.sha256(new / name) for name, path in existing.items() if name != hub.CARD
        )
        if not same:
            raise UserError(f"--to {folder}: exists and holds something else than this export; name another folder")
        text = existing[hub.CARD].read_text(encoding="utf-8")
        if license_name != UNKNOWN and f"license: {license_name}\n" not in text:
            raise UserError(
                f"--license {license_name}: {folder / hub.CARD} names another license; edit it, or name another folder"
            )
        if PLACEHOLDER in text:
            files.write_text(folder / hub.CARD, text.replace(PLACEHOLDER, shown))
    return False


def places(snap: Snapshot) -> dict[str, Any]:
    """{key: place on this machine} that whoever gets the snapshot can read in it."""
    taken = header.take_places(copy.deepcopy(snap.config), {})
    return taken | ({"the autoencoder": snap.codec["source"]} if snap.codec else {})


def sample_flags(snap: Snapshot, autoencoder: str | None) -> list[str]:
    """What sample.py needs besides the weights: a prompt, and the place of the `autoencoder` where they lie in no run."""
    prompts = bool(snap.config.model.args.get("max_prompt_bytes"))
    flags = ["--prompts", captions.plain(snap.class_names[0])] if prompts and snap.class_names else []
    return [*flags, commands.override("data.autoencoder", autoencoder)] if autoencoder else flags


def source_overrides(snap: Snapshot, shown: str | None = None) -> list[str]:
    """Where the source of a flow that starts at data lies, as overrides of the command line: sample.py takes it from the header
    only where the weights lie in a run. `shown` stands in for the places in what others read."""
    if snap.config.flow.source.name == GAUSSIAN:
        return []
    source_places = {k: place for k, place in places(snap).items() if k == "data.root" or k.startswith("flow.source.")}
    return [commands.override(key, shown or place) for key, place in source_places.items()]


def card(snap: Snapshot, dtype: str, license_name: str, shown: str) -> str:
    """The model card: YAML metadata, then Markdown."""
    from huggingface_hub import ModelCardData

    config = snap.config
    prompts = bool(snap.config.model.args.get("max_prompt_bytes"))
    run = locate.run_of(snap.path)
    results = run / "evaluation" / "results.md" if run else None
    metrics = results.read_text(encoding="utf-8", errors="replace").strip() if results and results.is_file() else None
    tags = ["flow-matching", "pytorch", config.model.name, config.data.name]
    task = None if snap.space.is_points else "text-to-image" if prompts else "unconditional-image-generation"
    data = ModelCardData(license=license_name, library_name=hub.LIBRARY, tags=tags, pipeline_tag=task)
    flags = [*sample_flags(snap, "PATH_OR_HUB_ID" if snap.codec else None), *source_overrides(snap, "PATH")]
    sample = ["sample.py", "--weights", shown, "--n_samples", "64", "--save_dir", "samples", *flags]
    size = sum(value.numel() for value in snap.weights.values())
    facts = {
        "samples": f"{snap.space.kind} {'x'.join(map(str, snap.decoded_shape))}",
        "training data": config.data.name,
        "classes": messages.first_names(snap.class_names) or "none",
        "training images seen": f"{snap.images:,} ({snap.step:,} steps)",
        "network": f"{config.model.name}, {size / 1e6:.2f} M numbers in {dtype}",
        "loss": config.loss.name,
        "path, prediction": f"{config.flow.path}, {config.flow.prediction}",
        "average of the weights": _average(snap),
    }
    parts = [
        f"---\n{data.to_yaml().strip()}\n---",
        f"# {run.resolve().name if run else config.model.name}@{snap.step}",
        "![samples](samples.png)",
        _table(facts),
        "## Sample",
        f"In a clone of {hub.LIBRARY}:",
        f"```bash\npython {shlex.join(sample)}\n```",
        *(["## Measured", metrics] if metrics else []),
        "`config.yaml` is the configuration of the training; `model.safetensors` carries it too, with a digest of itself.",
    ]
    return "\n\n".join(parts) + "\n"


def _average(snap: Snapshot) -> str:
    if snap.power_average:
        return f"EMA of width {snap.power_average.width:g}"
    return f"EMA with a half-life of {snap.half_life_images:,} images"


def _table(facts: Mapping[str, str]) -> str:
    return "\n".join(["| | |", "|---|---|", *(f"| {key} | {value.replace('|', '/')} |" for key, value in facts.items())])


def _write_picture(path: Path, snap: Snapshot) -> None:
    """The preview of the run at this step, which is of the first moving average, else a new one, by the settings of the
    previews."""
    of_previews = snap.power_average is None and snap.half_life_images == schema.half_lives(snap.config)[0]
    run = locate.run_of(snap.path) if of_previews else None
    preview = run / "samples" / step_names.name_of(snap.step, ".png") if run else None
    if preview is not None and preview.is_file():
        shutil.copyfile(preview, path)
        return
    n = snap.config.preview.n_samples
    model = snap.model()
    settings = preview_settings(snap.config, model.net, snap.class_names)
    with error_context("preview"):
        samples = Sampler(model).sample(
            n, prompts=settings.prompts, method=settings.method, steps=settings.steps, guidance_scale=settings.guidance_scale,
            seed=settings.seed, batch_size=snap.space.preview_batch_size,
        )  # fmt: skip
    names = column_names(settings, snap.class_names, model.net.num_classes)
    images.write_png(path, snap.space.picture(samples, len(names) or max(1, round(n**0.5)), names))
