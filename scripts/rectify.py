"""1-RF, pairs, 2-RF, pairs, distilled model, table and figure by one command: `python -m scripts.rectify -c YAML`.

Each step is a command that a user would type, and is printed. Run it again after a kill: it resumes and ends with the
same files. Below `folder`: a run folder for each model, the pairs, evaluation/ (every cell of the table),
comparison.md and comparison.png.
"""

import time
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator

from configs import schema
from configs.rectify import RectifyConfig, ReflowStageConfig
from configs.schema import Config, UserError
from flow import losses, solvers, time_samplers
from flow import path as paths
from flow.evaluation import plots, table
from flow.evaluation.features import FEATURE_EXTRACTORS_REGISTRY
from flow.model import FlowModel
from flow.runtime import cli, distributed, files, lock
from flow.runtime.errors import cli_main, error_context
from flow.runtime.subprocesses import run_command, train_arguments
from flow.sampling import images, snapshot
from flow.sampling.generate import generate, mean_straightness_deviation
from flow.sampling.settings import SamplerSettings

EXAMPLES = """\
  python -m scripts.rectify -c configs/mnist_rectify.yaml
  python -m scripts.rectify -c configs/mnist_rectify.yaml folder=runs/three_rounds rounds=3
  python -m scripts.rectify -c configs/mnist_rectify.yaml --launcher "accelerate-launch --multi_gpu --num_processes 8\""""
SHOWN_NFE = (1, 2)  # rows of the figure, and the largest of the table
COLUMNS = 8  # images of a class in a panel of the figure


def parse_args():
    parser = cli.Parser(__doc__, EXAMPLES, kind=RectifyConfig, keys="configs/rectify.py")
    cli.add_config_flag(parser, "e.g. configs/mnist_rectify.yaml", required=True)
    parser.add_argument("--launcher", metavar="COMMAND", help="what starts each script (default: this Python)")
    return parser.parse()


def main() -> None:
    args = parse_args()
    cfg = schema.load(args.config, args.overrides, kind=RectifyConfig)
    stages = {path: schema.load(path) for path in (cfg.first, cfg.reflow, cfg.distill)}
    check_stages(cfg, stages)
    with lock.folder(Path(cfg.folder)):
        rectify(args, cfg, stages)


def rectify(args, cfg: RectifyConfig, stages: dict[str, Config]) -> None:
    """The chain of commands, then the comparison."""
    folder = Path(cfg.folder)
    names = [*(f"{k}-rf" for k in range(1, cfg.rounds + 1)), "distilled"]
    precision = ["-mp", stages[cfg.first].train.mixed_precision]

    stage_list = commands(cfg, folder, names, precision)
    for k, (title, arguments) in enumerate(stage_list, start=1):
        print(f"\nstage {k} of {len(stage_list) + 1}: {title} ({elapsed(args.start)} so far)", flush=True)
        start = time.perf_counter()
        run_command(arguments(), args.launcher)
        print(f"stage {k} of {len(stage_list) + 1} took {elapsed(start)}", flush=True)
    print(f"\nstage {len(stage_list) + 1} of {len(stage_list) + 1}: comparison ({elapsed(args.start)} so far)", flush=True)
    snapshots = {name: snapshot.load(folder / name) for name in names}
    compare(cfg, folder, compared(cfg, names), snapshots, stages[cfg.first])
    result = f"comparison.md and comparison.png in {folder}"
    sample = cli.sample_command(folder / "distilled", f"{folder.name}_distilled", "--sampling_steps", "1")
    print(cli.summary(result, args.start, f"sample in one step with: {sample}"))


def elapsed(start: float) -> str:
    return cli.duration(time.perf_counter() - start)


def commands(
    cfg: RectifyConfig, folder: Path, names: list[str], precision: list[str]
) -> list[tuple[str, Callable[[], list[str]]]]:
    """Title and arguments of each command, in order; the arguments depend on the files that exist when the command starts."""
    result: list[tuple[str, Callable[[], list[str]]]] = []
    result.append((f"training of {names[0]}", partial(train_arguments, cfg.first, folder / names[0], [])))
    for k, (teacher, student) in enumerate(pairwise(names), start=1):
        pairs = folder / f"pairs_{teacher}"
        settings = cfg.first_pairs if k == 1 else cfg.later_pairs
        make = ["-m", "scripts.make_pairs", *pair_arguments(folder / teacher, pairs, settings, k), *precision]
        result.append((f"pairs of {teacher}", lambda make=make: make))
        config = cfg.distill if student == "distilled" else cfg.reflow
        overrides = [f"data.args.path={pairs}", f"train.init_from={folder / teacher}"]
        result.append((f"training of {student}", partial(train_arguments, config, folder / student, overrides)))
    for name, scale in compared(cfg, names):
        evaluate = [
            "evaluate.py", "--weights", str(folder / name), "--guidance_scale", f"{scale:g}", "--methods", "euler",
            "--sampling_steps", *map(str, cfg.nfe), "--n_samples", str(cfg.n_samples), "--metrics", "fid", "accuracy",
            "--feature_extractor", cfg.feature_extractor, "--out", str(folder / "evaluation"), *precision,
        ]  # fmt: skip
        guided = f" with guidance {scale:g}" if scale != 1 else ""
        result.append((f"evaluation of {name}{guided}", lambda evaluate=evaluate: evaluate))
    return result


def compared(cfg: RectifyConfig, names: list[str]) -> list[tuple[str, float]]:
    """Names and guidance scales of the rows of the table: the first flow also with the guidance that its pairs were made
    with, which is what the others have to be compared with."""
    rows = [(name, 1.0) for name in names]
    if cfg.first_pairs.guidance_scale != 1:
        rows.insert(1, (names[0], cfg.first_pairs.guidance_scale))
    return rows


def check_stages(cfg: RectifyConfig, stages: dict[str, Config]) -> None:
    """Raises UserError for what would otherwise fail after hours, in the middle of the chain."""
    for path, stage in stages.items():
        with error_context(f"{path}: loss"):
            time_sampler = time_samplers.build(stage.flow.time_sampler, **stage.flow.time_sampler_args)
            losses.build(stage.loss.name, paths.build(stage.flow.path), stage.flow.prediction, time_sampler, stage.loss.args)
    first = stages[cfg.first].model
    for path in (cfg.reflow, cfg.distill):
        if stages[path].flow.coupling != "paired":
            raise UserError(f"{path}: flow.coupling={stages[path].flow.coupling}: must be paired, as it trains on pairs")
        if stages[path].model != first:
            raise UserError(f"{path}: model: must be that of {cfg.first}, from whose weights it starts")
    if first.args.get("max_prompt_bytes"):
        raise UserError(f"{cfg.first}: model.args.max_prompt_bytes: the chain is for networks with labels or without any")
    for key in ("first_pairs", "later_pairs"):
        stage = schema.get(cfg, key)
        with error_context(f"{key}.sampling_method"):
            solvers.check(stage.sampling_method)
            if stage.sampling_method not in solvers.DETERMINISTIC:
                raise ValueError(f"{stage.sampling_method!r} cannot make pairs: its images depend on more than their noise")
        if stage.guidance_scale != 1 and not first.args.get("num_classes"):
            raise UserError(f"{key}.guidance_scale={stage.guidance_scale}: needs labels (model.args.num_classes)")
    if cfg.feature_extractor not in FEATURE_EXTRACTORS_REGISTRY:
        known = ", ".join(FEATURE_EXTRACTORS_REGISTRY)
        raise UserError(f"feature_extractor={cfg.feature_extractor}: unknown; choose one of {known}")


def pair_arguments(teacher: Path, save_dir: Path, stage: ReflowStageConfig, seed: int) -> list[str]:
    """Of make_pairs; each round has noise of its own."""
    return [
        "--weights", str(teacher), "--save_dir", str(save_dir), "--n_pairs", str(stage.n_pairs), "--seed", str(seed),
        "--sampling_method", stage.sampling_method, "--sampling_steps", str(stage.sampling_steps),
        "--guidance_scale", f"{stage.guidance_scale:g}", "--real_fraction", f"{stage.real_fraction:g}",
    ]  # fmt: skip


def compare(
    cfg: RectifyConfig, folder: Path, rows: list[tuple[str, float]], snapshots: dict[str, snapshot.Snapshot], first: Config
) -> None:
    """Write and print comparison.md, draw comparison.png."""
    accelerator = distributed.build_accelerator(first.train.mixed_precision)
    titles, straight, pictures = {}, {}, []
    nfes = [*SHOWN_NFE, max(cfg.nfe)]
    classes = first.model.args.get("num_classes")
    shown = COLUMNS * classes if classes else 10 * COLUMNS
    each = cfg.straightness_images * cfg.straightness_steps + shown * sum(nfes)
    total = sum(each * (2 if scale not in (0, 1) else 1) for _, scale in rows)
    bar = distributed.progress(accelerator, total, "straightness deviation and figure (network calls)")
    for name, scale in rows:
        snap = snapshots[name]
        model = snap.model()
        distributed.prepare_model(model.net, accelerator)
        model.net.register_forward_hook(lambda net, inputs, output: bar.update(len(inputs[0])))
        key = f"{name}@{snap.step}, {scale:g}"
        titles[key] = name + (f", w = {scale:g}" if scale != 1 else "")
        settings = SamplerSettings(guidance_scale=scale)
        indices = range(cfg.straightness_images)
        mean, error = mean_straightness_deviation(
            accelerator, model, snap.image_shape, indices, settings, cfg.straightness_steps
        )
        straight[titles[key]] = f"{mean:.4f} ± {error:.4f}"
        pictures.append([panel(accelerator, model, snap.image_shape, n, scale) for n in nfes])
    bar.close()
    results = table.read_rows(folder / "evaluation")
    extractor = cfg.feature_extractor
    results = [r for r in results if r["n"] == cfg.n_samples and r["identity"].get("extractor", [None])[0] == extractor]
    entries = table.aggregate([r for r in results if r.get("steps") in cfg.nfe])
    distance = next(name for e in entries for name in e["metrics"] if name.startswith(("FID", "FD-")))
    shown = [distance, "accuracy"] if all("accuracy" in e["metrics"] for e in entries) else [distance]
    text = table.by_nfe(entries, shown, titles, {"straightness deviation": straight})
    note = f"Cells: {' / '.join(shown)} of {cfg.n_samples:,} images, Euler steps. Straightness deviation: its mean over "
    note += f"{cfg.straightness_images} images ± standard error; 0 is straight."
    if any(scale not in (0, 1) for _, scale in rows):
        note += " With guidance (w) each velocity evaluation is two network calls, so NFE 2 costs four."
    files.write_text(folder / "comparison.md", f"{text}\n\n{note}\n")
    columns = [list(column) for column in zip(*pictures, strict=True)]
    plots.panels(folder / "comparison.png", columns, [f"NFE {n}" for n in nfes], list(titles.values()))
    print(f"\n{text}\n\n{note}")


def panel(
    accelerator: Accelerator, model: FlowModel, image_shape: tuple[int, int, int], steps: int, scale: float
) -> np.ndarray:
    """A row a class (without classes: ten rows), each column from one and the same noise: uint8 [H, W] or [H, W, 3]."""
    shown = []
    for label in range(model.net.num_classes or 1):
        labels = (label,) if model.net.num_classes else None
        settings = SamplerSettings("euler", steps, scale, labels=labels)
        n = COLUMNS if model.net.num_classes else 10 * COLUMNS
        shown += [batch.images for batch in generate(accelerator, model, image_shape, [range(n)], settings)]
    picture = images.grid(torch.cat(shown), COLUMNS, zoomed=False).permute(1, 2, 0).numpy()
    return picture[:, :, 0] if picture.shape[2] == 1 else picture


if __name__ == "__main__":
    cli_main(main)
