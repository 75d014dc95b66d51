"""The report as one HTML page, rendered from what `runs` has read."""

import math
import re
import time
from collections import Counter
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from configs.errors import UserError
from flow.evaluation import plots, results, table
from flow.evaluation.entries import CONTENT, KEY_COLUMNS, VARIANT, Statistic, is_distance, without_earlier_snapshots
from flow.runtime import files, messages
from flow.sampling import trajectory_grids
from flow.sampling.trajectory_grids import Grid, TrajectoryGrids
from scripts.report.pictures import Pictures, spread
from scripts.report.runs import PANELS, Run, differing_keys
from scripts.report.suggestions import SAMPLE, TRAJECTORY

HERE = Path(__file__).parent
PAGE, PICTURES = "index.html", "pictures"  # in the output folder
GENERATOR = "flow-matching-runner scripts.report"  # in the page: only a page with it is overwritten
PICTURE_BYTES = 6_000_000  # of all pictures in a page
MIN_RUN_BYTES = 150_000  # of the pictures of a run, where there are many
SAMPLE_SHARE = 0.6  # of a run's bytes that its previews and its grids of trajectories may take, each half where there are both
MAX_PREVIEWS = 40  # of a run
MAX_REFUSED = 8  # pictures in a row that are opened and do not fit
MAX_COMMANDS = 3  # of a kind, in the panel of samples
DASHES = ("", "5 3", "2 2", "6 2 2 2", "9 2")  # as many colors with each as there are in plots.COLORS


def check_output(out: Path) -> None:
    """Raises UserError where the page would overwrite a file that is none of this script."""
    page = out / PAGE
    if out.exists() and not out.is_dir():
        raise UserError(f"--out {out}: is a file; name a folder")
    if page.exists() and GENERATOR.encode() not in page.read_bytes()[:2000]:
        raise UserError(f"--out {out}: holds an {PAGE} that this script did not write; name another folder")


def write(runs: list[Run], out: Path, linked: bool, reload_seconds: int | None) -> Path:
    """Write the page and, with `linked`, its pictures beside it; the path of the page."""
    folder = out / PICTURES if linked else None
    budget = max(MIN_RUN_BYTES, PICTURE_BYTES // max(1, len(runs)))
    shown = [_pictures(run, Pictures(folder, budget)) for run in runs]
    text = _environment().get_template("template.html").render(_context(runs, shown) | {"reload": reload_seconds})
    files.write_bytes(out / PAGE, text.encode("utf-8", errors="replace"))
    if folder:
        written = {name for of_run in shown for name in of_run.written}
        for path in folder.glob("*"):
            if re.fullmatch(r"[0-9a-f]{20}\.(webp|gif)", path.name) and path.name not in written:
                path.unlink()
    return out / PAGE


@cache  # with the compiled template
def _environment() -> Environment:
    environment = Environment(
        loader=FileSystemLoader(HERE), autoescape=True, undefined=StrictUndefined, lstrip_blocks=True, trim_blocks=True
    )
    environment.policies["json.dumps_kwargs"] = {"separators": (",", ":"), "allow_nan": False}
    return environment


@dataclass
class Shown:
    """The pictures of a run that are in the page: their addresses, with what they show."""

    previews: list[dict[str, Any]]  # step, src
    grids: list[dict[str, Any]]  # step of the solver, t, scale, src
    figures: list[dict[str, Any]]  # name, src
    left_out: int  # figures for which there was no room
    previews_left_out: int  # also those beyond MAX_PREVIEWS
    grids_left_out: int
    written: set[str]  # names of files beside the page


def _pictures(run: Run, pictures: Pictures) -> Shown:
    """The pictures of a run, as many as there is room for. Lines on damaged ones are added to the problems of the run."""
    share = SAMPLE_SHARE if run.trajectory is None else SAMPLE_SHARE / 2
    steps = list(spread(sorted(run.previews)))
    most = len(steps) if pictures.folder else MAX_PREVIEWS
    previews, too_many = _with_room([(run.previews[step], {"step": step}) for step in steps[:most]], pictures, 1 - share)
    run.add_problems("samples", "samples", pictures.take_problems())
    folder = run.folder / trajectory_grids.FOLDER
    waiting = [
        (folder / grid.file, {"step": grid.step, "t": grid.t, "scale": grid.guidance_scale})
        for grid in _by_importance(run.trajectory)
    ]
    grids, grids_left_out = _with_room(waiting, pictures, 1 - SAMPLE_SHARE)
    run.add_problems("samples", str(trajectory_grids.FOLDER), pictures.take_problems())
    figures, left_out = _with_room([(path, {"name": _name(path, run.folder)}) for path in run.figures], pictures, 0)
    run.add_problems("figures", "figures", pictures.take_problems())
    previews.sort(key=lambda preview: preview["step"])
    return Shown(previews, grids, figures, left_out, len(steps[most:]) + too_many, grids_left_out, pictures.written)


def _with_room(
    waiting: list[tuple[Path, dict[str, Any]]], pictures: Pictures, reserved: float
) -> tuple[list[dict[str, Any]], int]:
    """What is known of these pictures, with their addresses, as long as more than the share `reserved` of the budget is left
    and not several in a row were too large; and for how many there was no room."""
    shown = []
    refused = pictures.left_out
    in_a_row = 0
    for k, (path, known) in enumerate(waiting):
        if in_a_row == MAX_REFUSED or not pictures.has_room(reserved):
            return shown, pictures.left_out - refused + len(waiting) - k
        before = pictures.left_out
        if source := pictures.source(path):
            shown.append({**known, "src": source})
        in_a_row = in_a_row + 1 if pictures.left_out > before else 0
    return shown, pictures.left_out - refused


def _by_importance(trajectory: TrajectoryGrids | None) -> list[Grid]:
    """The grids, so that each beginning of the list is spread over the steps of the solver and has all guidance scales."""
    grids = trajectory.grids if trajectory else ()
    order = {step: k for k, step in enumerate(spread(sorted({grid.step for grid in grids})))}
    return sorted(grids, key=lambda grid: order[grid.step])


def _name(path: Path, folder: Path) -> str:
    return str(path.relative_to(folder)) if path.is_relative_to(folder) else str(path)


def _context(runs: list[Run], shown: list[Shown]) -> dict[str, Any]:
    """What the template shows."""
    differing = differing_keys(runs)
    unusual = {key: _unusual([run.config.get(key) for run in runs if run.config]) for key in differing}
    rows = [_row(i, run, shown[i].figures) for i, run in enumerate(runs)]
    lines, floors, metrics = _quality(runs)
    names = [run.name for run in runs]
    data = {
        "runs": [
            {
                "name": run.name, "color": row["color"], "dash": [int(n) for n in row["dash"].split()],
                "curves": {"step": run.curves.step, "images": run.curves.images, "hours": run.curves.hours,
                           "columns": run.curves.columns},
                "previews": pictures.previews, "grids": pictures.grids, **_trajectory(run),
            }
            for run, row, pictures in zip(runs, rows, shown, strict=True)
        ],
        "lines": lines, "floors": floors, "metrics": metrics,
    }  # fmt: skip
    problems: dict[str, list[tuple[str, str]]] = {panel: [] for panel in PANELS}
    for run in runs:
        for problem in run.problems:
            problems[problem.panel].append((run.name, problem.text))
    unreadable = {panel: len(lines) for panel, lines in problems.items() if lines}
    has_grids = any(pictures.grids for pictures in shown)
    for run, pictures in zip(runs, shown, strict=True):
        grids_left_out = 0 if has_grids else pictures.grids_left_out  # else their number is below the grids
        left_out = {"figures": ("figures", pictures.left_out)}
        left_out |= {
            "previews": ("samples", pictures.previews_left_out),
            "grids of its trajectory": ("samples", grids_left_out),
        }
        for kind, (panel, count) in left_out.items():
            if count:
                problems[panel].append((run.name, f"{count} {kind} left out to keep the page small; --linked shows all"))
    without = [
        row for row, pictures in zip(rows, shown, strict=True)
        if TRAJECTORY in row["commands"] and not (pictures.grids or pictures.grids_left_out)
    ]  # fmt: skip
    return {
        "title": names[0] if len(names) == 1 else f"{len(names)} runs",
        "generator": GENERATOR,
        "time": time.strftime("%Y-%m-%d %H:%M:%S"),
        "place": str(Path.cwd()),
        "runs": rows,
        "problems": problems,
        "elsewhere": [(panel, count) for panel, count in unreadable.items() if panel != "overview"],
        "differing": differing,
        "unusual": unusual,
        "comparison": _comparison(runs, metrics),
        "quality": _table(runs, metrics),
        "note": table.NOTE,
        "has_quality": bool(metrics) or bool(problems["quality"]),
        "has_curves": any(run.curves.columns for run in runs),
        "has_previews": any(pictures.previews for pictures in shown),
        "has_grids": has_grids,
        "previews_left_out": sum(pictures.previews_left_out for pictures in shown),
        "grids_left_out": sum(pictures.grids_left_out for pictures in shown),
        "has_figures": any(pictures.figures for pictures in shown) or bool(problems["figures"]),
        "sample_commands": [(row["name"], row["commands"][SAMPLE]) for row in rows if SAMPLE in row["commands"]][:MAX_COMMANDS],
        "trajectory_commands": [(row["name"], row["commands"][TRAJECTORY]) for row in without[:MAX_COMMANDS]],
        "further_trajectories": [row["name"] for row in without[MAX_COMMANDS:]],
        "thinned": any("low" in column for run in runs for column in run.curves.columns.values()),
        "styles": _asset("uplot/uPlot.min.css") + _asset("page.css"),
        "library": Markup("/*!\n{}*/\n").format(_asset("uplot/LICENSE")) + _asset("uplot/uPlot.iife.min.js"),
        "script": _asset("page.js"),
        "data": data,
    }


def _trajectory(run: Run) -> dict[str, Any]:
    """What the captions of a run's grids say."""
    if run.trajectory is None:
        return {}
    names = ("weights", "solver", "steps", "seed", "columns")
    return {"trajectory": {name: getattr(run.trajectory, name) for name in names}}


def _unusual(values: list[str | None]) -> set[str | None]:
    """The values that are not the most common one; all of them where no value is the most common."""
    (usual, count), *others = Counter(values).most_common(2)
    return set(values) if others and others[0][1] == count else set(values) - {usual}


def _asset(name: str) -> Markup:
    """A file of this package, which goes into the page as it is."""
    return Markup((HERE / name).read_text(encoding="utf-8"))


def _row(index: int, run: Run, figures: list[dict]) -> dict[str, Any]:
    """A run in the tables of the page."""
    best, environment = run.best, run.environment
    statistic = best["metrics"][run.distance] if best else None
    commit, device, processes = (environment.get(key) or "" for key in ("commit", "device", "processes"))
    return {
        "index": index,
        "name": run.name,
        "color": index % len(plots.COLORS),
        "dash": DASHES[index // len(plots.COLORS) % len(DASHES)],
        "status": run.status,
        "step": run.step,
        "step_text": "" if run.step is None else f"{run.step:,}" + (f" of {run.steps:,}" if isinstance(run.steps, int) else ""),
        "images": run.images,
        "images_text": "" if run.images is None else f"{run.images:,}",
        "seconds": run.seconds,
        "time_text": "" if run.seconds is None else messages.duration(run.seconds),
        "rate": run.images_per_second,
        "rate_text": "" if run.images_per_second is None else f"{run.images_per_second:,.0f}",
        "best": statistic.mean if statistic else None,
        "best_text": f"{run.distance} {table.cell(run.distance, statistic)}" if statistic else "not evaluated",
        "best_cost": "" if not best else ("" if best["NFE"] is None else f"at NFE {best['NFE']:g}, ") + f"n = {best['n']:,}",
        "loss": run.loss,
        "jump": run.jump,
        "loss_text": "" if run.loss is None else f"{run.loss:.4g}",
        "device": f"{device}" + (f" × {processes}" if processes not in ("", 1) else ""),
        "commit": str(commit),
        "started": str(run.starts[0].get("time", "")) if run.starts else "",
        "command": str(run.starts[0].get("command", "")) if run.starts else "",
        "commands": run.commands,
        "config": run.config,
        "environment": environment,
        "log": run.log,
        "figures": figures,
        "words": " ".join([run.name, run.status.kind, str(device), *(f"{key}={value}" for key, value in run.config.items())]),
    }


def _quality(runs: list[Run]) -> tuple[list[dict], list[dict], list[str]]:
    """Lines of metrics over NFE, rows of real images, and the names of the metrics, distances first."""
    lines: list[dict] = []
    floors: list[dict] = []
    names: dict[str, None] = {}
    for i, run in enumerate(runs):
        entries = [e for e in run.entries if e["method"] is not None and _is_finite(e["NFE"])]
        names |= dict.fromkeys(
            n for e in run.entries for n in e["metrics"] if n != "seconds" and not results.is_class_column(n)
        )
        points = without_earlier_snapshots(entries)
        several = plots.several_of(points)
        of_run: dict[str, list[dict]] = {}
        for e in points:
            forwards = e["forwards"] if _is_finite(e["forwards"]) and e["forwards"] else e["NFE"]
            point = {"NFE": e["NFE"], "forwards": forwards, "values": _values(e)}
            of_run.setdefault(plots.line_name(e, several), []).append(point)
        lines += [{"run": i, "name": name, "points": members} for name, members in of_run.items()]
        controls = filter(results.is_control, run.entries)
        floors += [{"run": i, "name": f"{e['weights']}, n = {e['n']}", "values": _values(e)} for e in controls]
    distances = [name for name in names if is_distance(name)]
    return lines, floors, [*distances, *(name for name in names if name not in distances)]


def _is_finite(value: float | None) -> bool:
    return value is not None and math.isfinite(value)


def _values(entry: dict) -> dict[str, tuple[float, float | None]]:
    """{metric: (mean, half of its 95% interval, else its standard deviation over ranges)}, where it is finite."""
    values = {}
    for name, value in entry["metrics"].items():
        if value.mean is not None and math.isfinite(value.mean):
            bar = next((bar for bar in (value.interval, value.std) if math.isfinite(bar) and bar > 0), None)
            values[name] = value.mean, bar
    return values


def _comparison(runs: list[Run], metrics: list[str]) -> list[list[str]]:
    """For each setting that several runs were evaluated with: the best of them by the first metric, the next one, and their
    difference with its 95% interval, as if the errors of both were independent. The header comes first; empty where no
    setting has two runs, and where the first metric is no distance: of others a larger value may be better.
    """
    if not any(map(is_distance, metrics)):
        return []
    settings: dict[tuple, dict[str, dict]] = {}

    def rank(entry: dict) -> tuple[float, float]:  # the latest snapshot, and of its grids the best one
        return entry["images"] or 0, -(entry["metrics"][metrics[0]].mean or math.inf)

    distinct = {**plots.several_of([e for run in runs for e in run.entries if e["method"] is not None]), "weights": False}
    for run in runs:
        for e in run.entries:
            if e["method"] is not None and metrics[0] in e["metrics"]:  # else it is of real images or a folder
                # optimized times are fitted to the weights, so that every run has its own, as variants are
                own = ("weights", "times", VARIANT, *results.COST)
                key = tuple(e[name] for name in (*KEY_COLUMNS, CONTENT) if name not in own)
                of_runs = settings.setdefault(key, {})
                if run.name not in of_runs or rank(e) > rank(of_runs[run.name]):
                    of_runs[run.name] = e
    lines = []
    for of_runs in settings.values():
        measured = {name: e["metrics"][metrics[0]] for name, e in of_runs.items() if _is_finite(e["metrics"][metrics[0]].mean)}
        if len(measured) < 2:
            continue
        (best, a), (following, b) = sorted(measured.items(), key=lambda item: item[1].mean)[:2]
        interval = math.hypot(a.interval, b.interval)
        verdict = ""
        difference = table.cell(metrics[0], Statistic(b.mean - a.mean, math.nan, interval))
        if math.isfinite(interval):
            verdict = "clear" if b.mean - a.mean > interval else "not clear: within the interval"
        if b.mean == a.mean:
            verdict = "equal"
        e = of_runs[best]
        steps = f", {e['steps']} step{'s' * (e['steps'] != 1)}" if e["steps"] else ""
        cost = "" if e["NFE"] is None else f"{e['NFE']:g}"
        values = [table.cell(metrics[0], value) for value in (a, b)]
        solver = f"{plots.line_name(e, distinct)}{steps}"
        lines.append([cost, solver, str(e["n"]), best, values[0], following, values[1], difference, verdict])
    lines.sort(key=lambda line: (float(line[0] or "inf"), line[1]))
    names = ("NFE", "solver", "n", "best run", "its distance", "next run", "its distance", "difference", "verdict")
    return [list(names), *lines] if lines else []


def _table(runs: list[Run], metrics: list[str]) -> list[Any]:
    """The header of the table of metrics, then (indices of the runs, cells) for each entry; equal rows of real images once."""
    entries: list[tuple[list[int], dict]] = []
    controls: dict[tuple, list[int]] = {}
    for i, run in enumerate(runs):
        for e in run.entries:
            owners = [i]
            if results.is_control(e):
                row = (e["weights"], e["n"], e["reference"], e[CONTENT], *(e["metrics"].get(name) for name in metrics))
                if row in controls:
                    controls[row].append(i)
                    continue
                controls[row] = owners
            entries.append((owners, e))
    if not entries:
        return []
    columns = list(zip(*table.cells([e for _, e in entries], metrics), strict=True))
    header, *lines = zip(*(c for c in columns if c[0] != "ranges" or set(c[1:]) != {"1"}), strict=True)
    return [
        ["run", *header],
        *((owners, [runs[owners[0]].name, *line]) for (owners, _), line in zip(entries, lines, strict=True)),
    ]
