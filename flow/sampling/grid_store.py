"""Optimized time grids beside their snapshot: <snapshot>.grids.json."""

import json
from pathlib import Path

from configs.errors import UserError
from flow.runtime import commands, files
from flow.sampling.snapshot import Snapshot
from flow.solvers import FIXED_GRID


def file_of(weights: Path) -> Path:
    return weights.with_name(weights.name.removesuffix(".safetensors") + ".grids.json")


def store(snap: Snapshot, method: str, times: list[float]) -> None:
    """Add the grid of a method with len(times) - 1 steps, in place of an older one."""
    grids = read(snap)
    grids.setdefault(method, {})[str(len(times) - 1)] = times
    stored = {"weights_sha256": snap.sha256, "grids": grids}
    files.write_text(file_of(snap.path), json.dumps(stored, indent=1))


def load(snap: Snapshot, method: str, steps: int) -> tuple[float, ...]:
    """The times of an optimized grid. Raises UserError that names the stored ones where it is missing."""
    if method not in FIXED_GRID or steps < 2:
        able = f"at least 2 steps of {', '.join(FIXED_GRID)}"
        raise UserError(f"--time_grid optimized: is for {able}, not for {method} with {steps}")
    grids = read(snap)
    if str(steps) not in grids.get(method, {}):
        stored = "; ".join(f"{name} {' '.join(sorted(of, key=int))}" for name, of in grids.items()) or "nothing"
        flags = ["--methods", method, "--steps", str(steps), *(["--reference_steps", str(2 * steps)] if steps > 32 else [])]
        raise UserError(
            f"--time_grid optimized: none is stored for {method} with {steps} steps (stored: {stored}); "
            f"make one with: {commands.command('-m', 'scripts.optimize_grid', '--weights', snap.path, *flags)}"
        )
    return tuple(grids[method][str(steps)])


def read(snap: Snapshot) -> dict[str, dict[str, list[float]]]:
    """{method: {steps: times}}. Raises UserError for a file that is damaged or of other weights."""
    path = file_of(snap.path)
    if not path.is_file():
        return {}
    try:
        stored = files.read_json(path)
        fitted_to, grids = stored["weights_sha256"], {m: dict(of) for m, of in stored["grids"].items()}
        for steps, times in ((n, times) for of in grids.values() for n, times in of.items()):
            if len(times) != int(steps) + 1 or times != sorted(map(float, times)) or (times[0], times[-1]) != (0, 1):
                raise ValueError(f"{times} are no times of {steps} steps")
    except (ValueError, KeyError, TypeError, AttributeError):
        raise UserError(f"{path}: is not a whole file of grids; remove it and run optimize_grid again") from None
    if fitted_to != snap.sha256:
        raise UserError(f"{path}: was fitted to other weights than {snap.path.name}; remove it and run optimize_grid again")
    return grids
