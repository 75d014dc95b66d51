"""Averages of any width, reconstructed after the training from those that it stored (post-hoc EMA, flow/power_ema.py).

RUN/power_averages/width_0.050/step_00001000.safetensors is a stored average and
RUN/posthoc_ema/width_0.020_step_00001000.safetensors a reconstructed one; both are snapshots whose header names their width.
"""

import hashlib
import json
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import numpy as np
from accelerate import Accelerator
from torch import Tensor

from configs.errors import UserError
from flow import power_ema
from flow.power_ema import Profile
from flow.runtime import distributed, files, lock, step_names
from flow.sampling import digest, header, snapshot
from flow.sampling.header import PowerAverage

STORED, RECONSTRUCTED = "power_averages", "posthoc_ema"  # folders of a run
LARGE_ERROR = 0.1  # of a profile


class StoredAverage(NamedTuple):
    """A stored average."""

    path: Path
    power_average: PowerAverage
    digest: str  # of the file, as its header has it

    @property
    def step(self) -> int:
        return step_names.step_of(self.path)

    @property
    def profile(self) -> Profile:
        return Profile(self.power_average.width, self.power_average.updates)


def label(width: float) -> str:
    """A width in names of files: 0.05 is 0.050, 0.0525 stays as it is."""
    return np.format_float_positional(width, min_digits=3)


def stored_path(run: Path, width: float, step: int) -> Path:
    return run / STORED / f"width_{label(width)}" / step_names.name_of(step, ".safetensors")


def rewind(run: Path, step: int) -> None:
    """Delete the stored averages past a step, from a run that was killed after its last checkpoint: they are stored again."""
    for folder in (run / STORED).glob("width_*"):
        files.clean_temporaries(folder)
        for stored_at, path in step_names.by_step(folder, ".safetensors").items():
            if stored_at > step:
                path.unlink()


def reconstruct(accelerator: Accelerator, run: Path, widths: Sequence[float], step: int | None = None) -> list[Path]:
    """Snapshots of these widths at a stored step, by default the last, from the averages that were stored up to there.

    Those that exist already, made of the same averages, are taken as they are. The stored averages are read one after the
    other; memory holds one of them, and a float64 copy of the weights for each width. All processes call it, the main process
    writes.

    Raises:
        UserError: where the run has no stored averages, none at this step, or a damaged one.
    """
    last = distributed.decided_by_main(lambda: _sources(run, step)[-1].step)
    return distributed.main_process_first(accelerator, lambda: _reconstruct(accelerator, run, widths, last))


def _reconstruct(accelerator: Accelerator, run: Path, widths: Sequence[float], step: int) -> list[Path]:
    sources = _sources(run, step)
    updates = sources[-1].power_average.updates
    paths: list[Path] = []
    missing: dict[Path, PowerAverage] = {}
    for width in dict.fromkeys(widths):
        identity = [width, updates, [[*source.profile, source.digest] for source in sources]]
        target = PowerAverage(width, updates, hashlib.sha256(json.dumps(identity).encode()).hexdigest())
        path = run / RECONSTRUCTED / f"width_{label(width)}_{step_names.name_of(step, '.safetensors')}"
        paths.append(path)
        if not _holds(path, target):
            missing[path] = target
    if missing:
        with lock.folder(run / RECONSTRUCTED):
            _write(accelerator, sources, missing)
    return paths


def _write(accelerator: Accelerator, sources: list[StoredAverage], targets: dict[Path, PowerAverage]) -> None:
    """Write the snapshots {path: which average} as sums of the stored ones."""
    factors, sums = {}, {}
    for path, target in targets.items():
        profiles = [source.profile for source in sources]
        factors[path], error = power_ema.fit(profiles, Profile(target.width, target.updates))
        sums[path] = dict[str, Tensor]()
        advice = " (smaller with averages stored more often, ema.power_every_steps)" if error > LARGE_ERROR else ""
        accelerator.print(f"width {label(target.width)} from {len(sources)} stored averages: profile error {error:.1%}{advice}")
    shapes: dict[str, tuple[int, ...]] = {}
    with distributed.progress(accelerator, len(sources), "stored averages") as bar:
        bar.leave = False
        for i, source in enumerate(sources):
            stored = snapshot.read_weights(source.path)
            floating = {name: value for name, value in stored.items() if value.is_floating_point()}
            shapes = shapes or {name: tuple(value.shape) for name, value in floating.items()}
            if shapes != {name: tuple(value.shape) for name, value in floating.items()}:
                raise UserError(
                    f"--weights {source.path}: holds other weights than {sources[0].path}; it is of another network"
                )
            for path, total in sums.items():
                for name, value in floating.items():
                    if name in total:
                        total[name].add_(value.double(), alpha=factors[path][i])
                    else:
                        total[name] = value.double() * factors[path][i]
            bar.update()
    last = snapshot.load(sources[-1].path)
    for path, target in targets.items():
        weights = {name: sums[path][name].float() if name in shapes else value for name, value in last.weights.items()}
        snapshot.save(path, weights, last.config, last.image_shape, last.step, 0, last.codec, last.class_names, target)


def _sources(run: Path, step: int | None) -> list[StoredAverage]:
    """The averages of all widths that were stored up to a step, by default the last, by their step.

    A step counts where each width has it: a run that is going on may have written some of them.
    """
    folders = sorted((run / STORED).glob("width_*"))
    by_step = [step_names.by_step(folder, ".safetensors") for folder in folders]
    steps = sorted(set.intersection(*(set(paths) for paths in by_step))) if by_step else []
    if not steps:
        raise UserError(
            f"--weights {run}: holds no stored averages; give the folder of a run with ema.power_widths=[0.05, 0.1]"
        )
    if step is not None and step not in steps:
        nearest = sorted(sorted(steps, key=lambda other: abs(other - step))[:3])
        raise UserError(f"--step {step}: no averages were stored at this step; the nearest are {', '.join(map(str, nearest))}")
    return [_source(paths[k]) for k in steps if step is None or k <= step for paths in by_step]


def _source(path: Path) -> StoredAverage:
    entries = snapshot.read_header(path)
    try:
        power_average = header.power_average(entries)
    except ValueError as error:
        raise UserError(f"--weights {path}: not a stored average: its header is broken ({error})") from None
    if power_average is None or not power_average.updates:
        raise UserError(f"--weights {path}: not a stored average: its header has no width, or no updates")
    return StoredAverage(path, power_average, entries.get(digest.KEY, ""))


def _holds(path: Path, target: PowerAverage) -> bool:
    """Whether the file is there, whole, and this average."""
    if path.is_file():
        with suppress(ValueError):  # damaged: it is written again
            snapshot.read_weights(path)
            return header.power_average(snapshot.read_header(path)) == target
    return False
