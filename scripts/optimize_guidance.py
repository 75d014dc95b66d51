"""The best guidance of a model: `python -m scripts.optimize_guidance --weights runs/mnist --guidance_scale 1 1.2 1.5 2 3`.

Each scale in each interval, by the null label and by each of --guide_weights, is a row of one table, made by evaluate.py; a
second call adds only what is missing. With --halving all begin on few images, and the better half of them goes on with twice as
many, up to --n_samples. `--out` gets guidance.png, distance against scale, beside the files of evaluate.py.
"""

import argparse
import copy
import math
from dataclasses import replace
from functools import cache
from typing import NamedTuple

from configs.errors import UserError
from datasets import captions
from flow.evaluation import evaluate_command, plots, results, table
from flow.evaluation.entries import aggregate, distance_name
from flow.evaluation.snapshots import columns_of
from flow.runtime import cli, commands, distributed, flags, lock, messages
from flow.runtime.errors import CONTINUES, cli_main
from flow.sampling import guide, locate, snapshot
from flow.sampling.settings import ALL_TIMES, SamplerSettings, validate
from flow.solvers import SOLVERS

EXAMPLES = """\
  python -m scripts.optimize_guidance --weights runs/mnist --out runs/mnist/guidance --feature_extractor mnist \\
      --guidance_scale 1 1.2 1.5 2 3 --intervals 0:1 0.2:0.8 0.4:1 --sampling_method heun --sampling_steps 10
  python -m scripts.optimize_guidance --weights runs/mnist --out runs/mnist/guidance --feature_extractor mnist --halving \\
      --guidance_scale 1.5 2 3 --guide_weights runs/mnist/snapshots/step_00001000.safetensors"""

FEWEST = 500  # images of the first round of --halving


class Guidance(NamedTuple):
    """A candidate."""

    scale: float
    interval: tuple[float, float] = ALL_TIMES
    guide: str | None = None  # --guide_weights of evaluate.py

    @property
    def curve(self) -> str:
        """What the curve of this candidate is called."""
        by = f"autoguidance by {title_of(self.guide)}" if self.guide else "classifier-free guidance"
        low, high = self.interval
        return by + (f", t from {low:g} to {high:g}" if self.interval != ALL_TIMES else "")

    @property
    def flags(self) -> list[str]:
        """The flags of sample.py for this candidate."""
        interval = [f"{t:g}" for t in self.interval]
        words = ["--guidance_interval", *interval] if self.interval != ALL_TIMES else []
        return [*commands.condition_flags(self.scale), *words, *(["--guide_weights", self.guide] if self.guide else [])]


def parse_args():
    parser = cli.Parser(__doc__, EXAMPLES)
    flags.add_weights_flag(parser)
    flags.add_guidance_flag(parser, several=True)
    parser.add_argument(
        "--intervals", nargs="+", type=interval, default=[ALL_TIMES], metavar="LO:HI", help="times t of it (default: 0:1)"
    )
    parser.add_argument("--guide_weights", nargs="+", default=[], metavar="PATH", help="guides of autoguidance, weaker models")
    parser.add_argument("--halving", action="store_true", help="leave the worse half behind, with each doubling of the images")
    flags.add_method_flag(parser, SOLVERS, "heun")
    flags.add_count_flag(parser, "--sampling_steps", "steps of the solver", 10)
    flags.add_count_flag(parser, "--n_samples", "images per row", 5000, least=2)
    flags.add_seed_flag(parser)
    flags.add_extractor_flag(parser)
    flags.add_precision_flag(parser)
    flags.add_launcher_flag(parser, "evaluate.py")
    flags.add_output_flag(parser)
    return parser.parse()


@cache
def title_of(weights: str) -> str:
    """What a table calls the snapshot behind --guide_weights."""
    return guide.name_of(snapshot.load(weights), weights)


def interval(text: str) -> tuple[float, float]:
    """An argparse type: two times, LO:HI."""
    low, colon, high = text.partition(":")
    if not colon:
        raise argparse.ArgumentTypeError(f"{text!r}: must be LO:HI, two numbers from 0 to 1")
    return flags.fraction(low), flags.fraction(high)


def main() -> None:
    args = parse_args()
    snap = snapshot.load(args.weights, None, args.overrides)
    if snap.space.is_points:
        raise UserError(f"--weights {args.weights}: is a flow of points; guidance is compared on images")
    model = snap.model(decode=False)
    left = candidates(args, model.net.null is not None)
    for path in dict.fromkeys(c.guide for c in left if c.guide):
        guide.attach(copy.copy(model), snap, path)  # one that does not fit is named before hours of rows
    prompts = tuple(map(captions.plain, snap.class_names)) if model.net.max_prompt_bytes else None  # as evaluate.py
    with args.naming_flags("optimize_guidance"):
        for scale, times, weights in left:
            base = SamplerSettings(args.sampling_method, args.sampling_steps, scale, prompts=prompts)
            validate(replace(base, guidance_interval=times, guide=weights), model)
    accelerator = distributed.build_single_process_accelerator("optimize_guidance")
    with lock.folder(args.out, accelerator):
        rounds = number_of_rounds(len(left), args.n_samples) if args.halving else 0
        measured: dict[Guidance, dict] = {}  # the last entry of each
        floors: dict[tuple[str, int], dict] = {}
        for k in range(rounds + 1):
            n = -(-args.n_samples // 2 ** (rounds - k))
            if rounds:
                print(f"\nround {k + 1} of {rounds + 1}: {len(left)} kinds of guidance on {n} images each", flush=True)
            by_candidate, real = evaluate(args, snap, left, n)
            measured |= by_candidate
            floors |= {(entry["weights"], entry["n"]): entry for entry in real}
            distance = distance_name([by_candidate[left[0]]])
            left.sort(key=lambda candidate: by_candidate[candidate]["metrics"][distance].mean)
            if k < rounds:
                left = left[: -(-len(left) // 2)]
        plots.distance_against_scale(args.out / "guidance.png", curves(measured), list(floors.values()))
    best = left[0]
    reached = by_candidate[best]["metrics"][distance]
    value = f"{distance} {table.cell(distance, reached)}"
    words = [
        *best.flags,
        *commands.condition_flags(prompts=prompts and prompts[:8]),
        "--sampling_method",
        args.sampling_method,
        "--sampling_steps",
        str(args.sampling_steps),
        "--seed",
        str(args.seed),
        *args.typed("mixed_precision"),
    ]
    result = f"best: guidance {best.scale:g}, {best.curve}: {value}; table and guidance.png in {args.out}"
    sample = commands.sample_command(args.weights, "best_guidance", *words, *args.overrides)
    print(messages.summary(result, args.start, f"sample with it: {sample}"))


def candidates(args, has_labels: bool) -> list[Guidance]:
    """All of the command line; a scale of 1 is no guidance and there once. Raises UserError for fewer than two."""
    guide_snaps = {w: snapshot.load(w) for w in args.guide_weights}
    # by name, as a run and its file are one
    named = {guide.name_of(snap, w): locate.pinned(w, snap.path) for w, snap in guide_snaps.items()}
    guides = [*([None] if has_labels else []), *named.values()]
    scales = dict.fromkeys(args.guidance_scale)
    guided = [Guidance(w, t, g) for g in guides for t in dict.fromkeys(args.intervals) for w in scales if w != 1]
    compared = [*([Guidance(1.0)] if 1 in scales else []), *guided]
    if len(compared) < 2:
        need = "" if guides else ", and a network without labels needs --guide_weights"
        raise UserError(f"--guidance_scale {' '.join(f'{w:g}' for w in scales)}: needs two kinds of guidance at least{need}")
    return compared


def number_of_rounds(count: int, n_samples: int) -> int:
    """Halvings that leave one of `count`, or begin on FEWEST images."""
    return max(0, min(math.ceil(math.log2(count)), math.floor(math.log2(n_samples / FEWEST))))


def evaluate(args, snap: snapshot.Snapshot, candidates: list[Guidance], n: int) -> tuple[dict[Guidance, dict], list[dict]]:
    """The entry of the table of each candidate on n images, and those of real images."""
    groups: dict[tuple, list[float]] = {}
    for scale, times, weights in candidates:
        groups.setdefault((times, weights), []).append(scale)
    folder = args.out / "evaluation"
    rows: list[dict] = []
    for (times, weights), scales in groups.items():
        words = commands.evaluate_arguments(
            locate.pinned(args.weights, snap.path), folder, args.overrides, guidance_scale=scales,
            guidance_interval=times if times != ALL_TIMES else None, guide_weights=weights, methods=args.sampling_method,
            sampling_steps=args.sampling_steps, n_samples=n, seed=args.seed, feature_extractor=args.feature_extractor,
            mixed_precision=args.mixed_precision,
        )  # fmt: skip
        rows += evaluate_command.run(words, args.launcher)
    by_columns = {columns(c): c for c in candidates}
    by_candidate, real = {}, {}
    for row in rows:
        [entry] = aggregate([row])
        if results.is_control(row):
            real[row["weights"]] = entry
            continue
        scale = 1.0 if row["guidance_scale"] is None else row["guidance_scale"]
        by_candidate[by_columns[scale, row.get("guidance_interval"), row.get("guide")]] = {**entry, "guidance_scale": scale}
    return by_candidate, list(real.values())


def columns(c: Guidance) -> tuple[float, str | None, str | None]:
    """What evaluate.py writes of it in a row."""
    settings = SamplerSettings(guidance_scale=c.scale, guidance_interval=c.interval, guide=c.guide and title_of(c.guide))
    written = columns_of(settings)
    return c.scale, written.get("guidance_interval"), written.get("guide")


def curves(by_candidate: dict[Guidance, dict]) -> dict[str, list[dict]]:
    """The lines of the figure; each begins without guidance, where that was evaluated on as many images. Their names tell
    numbers of images apart, as a distance depends on it."""
    several = len({entry["n"] for entry in by_candidate.values()}) > 1

    def name(curve: str, entry: dict) -> str:
        return f"{curve}, n = {entry['n']}" if several else curve

    lines: dict[str, list[dict]] = {}
    start = [entry for c, entry in by_candidate.items() if c.scale == 1]
    for c, entry in by_candidate.items():
        if c.scale != 1:
            begin = [plain for plain in start if plain["n"] == entry["n"]]
            lines.setdefault(name(c.curve, entry), begin).append(entry)
    alone = [plain for plain in start if not any(plain in line for line in lines.values())]
    return lines | {name("no guidance", plain): [plain] for plain in alone}


if __name__ == "__main__":
    cli_main(main, CONTINUES)
