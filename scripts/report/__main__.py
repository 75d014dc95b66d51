"""A page that compares runs, `python -m scripts.report runs/a runs/b --out report`: one HTML file that needs no network.

It shows state, settings, curves, tables of evaluate.py, previews and figures of run folders, or of all runs in a folder, as
they are now; no lock is taken, so that runs may be going on. `--watch` builds it again and again, and the page reloads itself.
"""

import time
from contextlib import suppress
from pathlib import Path

from configs.errors import UserError
from flow.runtime import cli, flags, lock, messages
from flow.runtime.errors import cli_main
from flow.sampling.locate import names_of
from scripts.report import page
from scripts.report.runs import MARKS, Run, find_runs, read_run
from scripts.report.suggestions import TRAJECTORY

EXAMPLES = """\
  python -m scripts.report runs/digits
  python -m scripts.report runs --out report
  python -m scripts.report runs/a runs/b --out report --watch 30
  python -m scripts.report runs/toy --figures figures/checkerboard"""

POINTS, MIN_POINTS, MAX_POINTS = 6000, 200, 1000  # of a curve: of all runs together, and of one
WATCH_SECONDS = 15


def parse_args():
    parser = cli.Parser(__doc__, EXAMPLES)
    parser.add_argument("runs", nargs="+", type=Path, metavar="DIR", help="run folders, or folders of runs")
    parser.add_argument("--out", type=Path, default=Path("report"), metavar="DIR", help="output folder (default: report)")
    parser.add_argument(
        "--watch", nargs="?", type=flags.at_least(1), const=WATCH_SECONDS, metavar="SECONDS",
        help=f"build it again every so many seconds (default: {WATCH_SECONDS}) until Ctrl-C",
    )  # fmt: skip
    parser.add_argument("--linked", action="store_true", help="figures as files beside the page, all of them")
    parser.add_argument(
        "--figures", nargs="+", type=Path, default=[], metavar="DIR",
        help="further folders with figures, e.g. of scripts.animate --out; those in a run folder are found",
    )  # fmt: skip
    return parser.parse(takes_keys=False)


def main() -> None:
    args = parse_args()
    for folder in args.figures:
        if not folder.is_dir():
            raise UserError(f"--figures {folder}: there is no such folder")
    find_runs(args.runs)
    if any((args.out / mark).exists() for mark in MARKS):
        raise UserError(f"--out {args.out}: is the folder of a run; name another folder")
    page.check_output(args.out)
    with lock.folder(args.out):
        with suppress(KeyboardInterrupt):  # which ends the watching
            while args.watch:
                start = time.monotonic()
                path, _ = build(args, args.watch)
                print(f"{path} built in {time.monotonic() - start:.1f} s; Ctrl-C ends", flush=True)
                time.sleep(args.watch)
        path, runs = build(args, None)
    size = path.stat().st_size / 1e6
    print(messages.summary(f"{path}, {size:.1f} MB", args.start, next_step(runs)))


def next_step(runs: list[Run]) -> str:
    """What to do with the page, and the command of the grids that the first run without them lacks."""
    if all(run.is_empty for run in runs):
        return f"it is empty: no run in {', '.join(str(run.folder) for run in runs)}; give run folders, or a folder of runs"
    commands = [run.commands[TRAJECTORY] for run in runs if TRAJECTORY in run.commands and run.trajectory is None]
    more = f"; grids for its sliders over solver steps and guidance are made with: {commands[0]}" if commands else ""
    return f"open it in a browser{more}"


def build(args, reload_seconds: int | None) -> tuple[Path, list[Run]]:
    """Read the runs and write the page; its path and the runs."""
    runs = read_runs(args.runs, args.figures)
    return page.write(runs, args.out, args.linked, reload_seconds), runs


def read_runs(paths: list[Path], figures: list[Path]) -> list[Run]:
    """The runs in these folders; `figures` belong to a run of the same name, else to the first one."""
    folders = find_runs(paths)
    points = min(MAX_POINTS, max(MIN_POINTS, POINTS // len(folders)))
    names = names_of(folders)
    owners = [names.index(figure.name) if figure.name in names else 0 for figure in figures]
    return [
        read_run(folder, name, points, [p for p, owner in zip(figures, owners, strict=True) if owner == i])
        for i, (folder, name) in enumerate(zip(folders, names, strict=True))
    ]


if __name__ == "__main__":
    cli_main(main)
