"""Optimized time grids beside their snapshot: <snapshot>.grids.json."""

import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from configs.errors import UserError
from datasets import captions
from flow.runtime import commands, distributed, files
from flow.sampling.settings import ALL_TIMES, SamplerSettings
from flow.sampling.snapshot import Snapshot
from flow.solvers import FIXED_GRID

Grids = dict[str, dict[str, list[float]]]  # {method: {steps: times}}
Scales = dict[str, dict[str, float]]  # {method: {steps: guidance scale of the flow that the times were fitted to}}


def file_of(weights: Path) -> Path:
    return weights.with_name(weights.name.removesuffix(".safetensors") + ".grids.json")


def store(snap: Snapshot, method: str, times: list[float], guidance_scale: float = 1.0) -> None:
    """Add the grid of a method with len(times) - 1 steps, fitted with this guidance scale, in place of an older one."""
    grids, scales = _read(snap)
    steps = str(len(times) - 1)
    grids.setdefault(method, {})[steps] = times
    scales.setdefault(method, {})[steps] = guidance_scale
    stored = {"weights_sha256": snap.sha256, "grids": grids, "guidance_scales": scales}
    files.write_text(file_of(snap.path), json.dumps(stored, indent=1))


def times_of(time_grid: str, snap: Snapshot, method: str, steps: int, flags: Sequence[str] = ()) -> tuple[float, ...] | None:
    """The times of an optimized grid, the same on every process; None for the other grids, which are formulas. `flags` and
    errors are those of `load`."""
    return distributed.decided_by_main(partial(load, snap, method, steps, flags)) if time_grid == "optimized" else None


def load(snap: Snapshot, method: str, steps: int, flags: Sequence[str] = ()) -> tuple[float, ...]:
    """The times of an optimized grid.

    Args:
        flags: further ones of the command that an error suggests: guidance scale, prompts and overrides of the caller.

    Raises:
        UserError: where the grid is missing; it names the stored ones.
    """
    if method not in FIXED_GRID or steps < 2:
        able = f"at least 2 steps of {', '.join(FIXED_GRID)}"
        raise UserError(f"--time_grid optimized: is for {able}, not for {method} with {steps}")
    grids = read(snap)
    if str(steps) not in grids.get(method, {}):
        stored = "; ".join(f"{name} {' '.join(sorted(of, key=int))}" for name, of in grids.items()) or "nothing"
        own = ["--methods", method, "--steps", str(steps), *(["--reference_steps", str(2 * steps)] if steps > 32 else [])]
        if snap.config.model.args.get("max_prompt_bytes") and snap.class_names and "--prompts" not in flags:
            own += ["--prompts", captions.plain(snap.class_names[0])]
        raise UserError(
            f"--time_grid optimized: none is stored for {method} with {steps} steps (stored: {stored}); "
            f"make one with: {commands.command('-m', 'scripts.optimize_grid', '--weights', snap.path, *own, *flags)}"
        )
    return tuple(grids[method][str(steps)])


def fitted_scale(snap: Snapshot, method: str, steps: int) -> float | None:
    """The guidance scale that a grid was fitted with; None where there is no grid, or a file of an earlier version."""
    return _read(snap)[1].get(method, {}).get(str(steps))


def fit_note(snap: Snapshot, settings: SamplerSettings) -> str | None:
    """A line where the grid of these settings was fitted with another guidance, else None."""
    if not settings.times:
        return None
    fitted = fitted_scale(snap, settings.method, settings.steps)
    scale = settings.guidance_scale
    if fitted is None:
        return None
    grid = f"--time_grid optimized: the grid of {settings.method} with {settings.steps} steps was fitted"
    if fitted != scale:
        return f"{grid} at w = {fitted:g}, not at w = {scale:g}"
    other = settings.guide or settings.guidance_interval != ALL_TIMES
    return f"{grid} with classifier-free guidance at all times" if other else None


def read(snap: Snapshot) -> Grids:
    """All stored grids. Raises UserError for a file that is damaged or of other weights."""
    return _read(snap)[0]


def _read(snap: Snapshot) -> tuple[Grids, Scales]:
    path = file_of(snap.path)
    if not path.is_file():
        return {}, {}
    try:
        stored = files.read_json(path)
        fitted_to = stored["weights_sha256"]
        grids = {m: dict(of) for m, of in stored["grids"].items()}
        for steps, times in ((n, times) for of in grids.values() for n, times in of.items()):
            if len(times) != int(steps) + 1 or times != sorted({*map(float, times)}) or (times[0], times[-1]) != (0, 1):
                raise ValueError(f"{times} are not the times of {steps} steps")
        fitted_with = stored.get("guidance_scales", {})  # of earlier versions: not there
        scales = {m: {n: float(scale) for n, scale in of.items()} for m, of in fitted_with.items()}
    except (ValueError, KeyError, TypeError, AttributeError):
        raise UserError(f"{path}: is not a whole file of grids; remove it and run optimize_grid again") from None
    if fitted_to != snap.sha256:
        raise UserError(f"{path}: was fitted to other weights than {snap.path.name}; remove it and run optimize_grid again")
    return grids, scales
