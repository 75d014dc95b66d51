"""Tables of distance to the data against NFE: `accelerate-launch evaluate.py --weights runs/mnist --methods euler heun ...`.

One row for each method, number of steps, guidance scale and range of images. Images go from the network straight into
the feature extractor, on every process. `--samples DIR` scores a folder of images instead. `--out` gets results.jsonl,
results.csv, results.md and nfe.png; existing rows are not computed again. `--snapshots` has rows for several snapshots of a
run and a figure over its training, snapshots.png; `--ema_width` rows for other averages of its weights, and ema_width.png.

The classes of the images are as frequent as in the reference. A row `real (...)` shows the floor: as many real images that are
not in the reference, from the other split of the data set; where it has none, one random half against the other half.
"""

import shlex
from dataclasses import replace
from pathlib import Path

from accelerate import Accelerator

from configs import loading
from configs.errors import UserError
from flow.evaluation import control, folders, metrics, results, runner, snapshots
from flow.model import FlowModel
from flow.runtime import cli, commands, distributed, files, flags, lock, messages
from flow.runtime.errors import CONTINUES, cli_main
from flow.sampling import grid_store, guide, locate, posthoc_ema, snapshot, sources
from flow.sampling.conditions import conditions_in_turn
from flow.sampling.settings import SamplerSettings, guidance_note, validate
from flow.solvers import SOLVERS

N_SAMPLES = 50_000
GENERATION = (  # flags that say how images are made
    "methods", "sampling_steps", "nfe", "time_grid", "guidance_scale", "guidance_interval", "guide_weights", "source", "labels",
    "captions", "n_samples", "repeats", "seed", "rtol", "atol", "sde_noise_scale", "eta", "diffusion", "compile",
    "mixed_precision",
)  # fmt: skip
EXAMPLES = """\
  accelerate-launch evaluate.py --weights runs/mnist --feature_extractor mnist --methods euler heun --sampling_steps 5 10 50
  accelerate-launch evaluate.py --weights runs/cifar10 --methods heun --sampling_steps 18 --n_samples 50000 --repeats 3
  accelerate-launch evaluate.py --weights runs/mnist --snapshots all --methods heun --sampling_steps 18 --n_samples 10000
  accelerate-launch evaluate.py --samples samples/mnist --reference mnist --feature_extractor mnist"""


def parse_args():
    parser = cli.Parser(__doc__, EXAMPLES)
    flags.add_config_flag(parser)
    flags.add_weights_flag(parser, required=False)
    flags.add_widths_flag(
        parser, "--ema_width", "instead of the weights of the run, averages of these widths (scripts.posthoc_ema)"
    )
    parser.add_argument(
        "--snapshots", nargs="+", metavar="all|STEP", help="rows for these snapshots of the run that --weights names"
    )
    parser.add_argument("--samples", type=Path, metavar="DIR", help="score this folder of images, no weights needed")
    flags.add_methods_flag(parser, SOLVERS, ["euler"])
    flags.add_step_flags(parser, [100], several=True)
    flags.add_solver_flags(parser)
    flags.add_guidance_flags(parser, several=True)
    flags.add_source_flag(parser)
    flags.add_labels_flag(parser, "each as often as in the reference or training set")
    parser.add_argument(
        "--captions", choices=("plain", "held_out"), help="networks with text: one caption a class (default), or unseen ones"
    )
    use = f"images per row (default: {N_SAMPLES}, or as many as a flow from data has starts)"
    flags.add_count_flag(parser, "--n_samples", use, least=2)
    flags.add_count_flag(parser, "--repeats", "image ranges that a row is repeated on", 1)
    flags.add_seed_flag(parser)
    flags.add_batch_size_flag(parser)
    flags.add_precision_flag(parser)
    flags.add_compile_flag(parser)
    flags.add_feature_flags(parser)
    parser.add_argument(
        "--reference",
        metavar="DIR|NPZ|NAME",
        help="real images; NAME:train or NAME:test is a split (default: the training set)",
    )
    parser.add_argument(
        "--metrics", nargs="+", choices=metrics.METRICS, default=list(metrics.DEFAULT),
        help=f"(default: {' '.join(metrics.DEFAULT)}, which take seconds; what each measures and costs: docs/evaluation.md)",
    )  # fmt: skip
    parser.add_argument("--no_control", action="store_true", help="leave out the row of real images that shows the floor")
    flags.add_output_flag(
        parser,
        use="(default: evaluation/ in the run folder, beside other weights or in the folder of sample.py; DIR_evaluation "
        "beside other folders; of hf:owner/NAME: NAME/evaluation)",
        required=False,
    )
    parser.add_argument(
        "--rows_file", type=Path, metavar="FILE", help="also write the rows of this command as JSON lines to this new file"
    )
    args = parser.parse()
    if args.samples:
        args.refuse_typed((*GENERATION, *flags.further_options()), "does not go with --samples, whose images are there already")
        if other := next((key for key in loading.overridden(args.overrides) if not key.startswith("data.")), None):
            raise UserError(f"{other}: does not go with --samples, for which only keys of data have a meaning")
    return args


def main() -> None:
    args = parse_args()
    if (args.weights is None) == (args.samples is None):
        raise UserError("give either --weights PATH or --samples DIR")
    if args.samples and not args.reference:
        lacks_training = "memorization" in args.metrics and not names_training(args)
        needed = "; memorization also needs the training, by -c or data.name" if lacks_training else ""
        raise UserError(f"--samples: a --reference is needed: a folder, an npz file or the name of a data set{needed}")
    if args.samples and Path(args.reference).resolve() == args.samples.resolve():
        raise UserError(f"--reference {args.reference}: is the folder of the samples; name real images")
    if args.rows_file and args.rows_file.exists():
        raise UserError(f"--rows_file {args.rows_file}: is there already; name a new file")
    for flag in filter(vars(args).get, ("snapshots", "ema_width")):
        if args.samples or args.time_grid == "optimized":
            other = "--samples" if args.samples else "--time_grid optimized, whose times are fitted to one snapshot"
            raise UserError(f"--{flag}: does not go with {other}")
    if args.snapshots and args.ema_width:
        raise UserError("--ema_width: does not go with --snapshots; one of the two chooses the weights")
    accelerator = distributed.build_accelerator(args.mixed_precision)
    if args.samples:
        evaluate_folder(args, accelerator)
    else:
        evaluate_weights(args, accelerator)


def evaluate_weights(args, accelerator: Accelerator) -> None:
    """A row for each snapshot or average x method x steps x guidance scale x range of images; a scale of 1 has neither
    interval nor guide."""
    path = Path(args.weights)  # one of the hub too
    paths = distributed.decided_by_main(lambda: locate.snapshots_of_run(path, args.snapshots)) if args.snapshots else [path]
    if args.ema_width:
        paths = posthoc_ema.reconstruct(accelerator, path, args.ema_width)
    snap = snapshot.load(paths[-1], args.config, args.overrides)
    model = snap.model()
    net = model.net
    guide_name = guide.attach(model, snap, args.guide_weights)
    if args.reference is None or net.max_prompt_bytes or "memorization" in args.metrics:
        snap.check_data()
    for network in model.networks:
        distributed.prepare_model(network, accelerator, args.compile)
    sources.attach(accelerator, model, args.source, snap.config.data.root)
    labels = flags.labels_of(args.labels, snap.class_names)
    captions_of = snapshots.captions_by_class(args.captions, labels, accelerator, snap.config, net)
    turns, prompts = conditions_in_turn(labels, captions_of)
    plan = plan_of(args, snap, model, turns, prompts, guide_name)
    notes = [guidance_note(sampler, model) for sampler in plan]
    notes += [grid_store.fit_note(snap, sampler) for sampler in plan]
    for note in dict.fromkeys(filter(None, notes)):
        accelerator.print(f"note: {note}")
    name = locate.name_of(path)
    out = args.out or locate.results_folder(path) / "evaluation"
    captions = (args.captions or "plain") if net.max_prompt_bytes else None
    settings = evaluation_settings(args, f"--weights {args.weights}", args.n_samples or default_number(model, args.repeats))
    changed = args.config or any(key.startswith(("flow.", "model.")) for key in loading.overridden(args.overrides))
    further = snapshot.network_record(snap.config) if changed else {}
    with lock.folder(out, accelerator):
        evaluator = snapshots.SnapshotEvaluator.build(
            settings, accelerator, out, snap.config, snap.space, model, snap.class_names, plan, captions_of, not labels, further
        )
        rows = [row for row in [control.add_control(evaluator.evaluation)] if row]
        for file in paths:
            if len(paths) > 1:
                snap = snapshot.load(file, args.config, args.overrides)
                snap.load_into(net)
            distributed.check_same(accelerator, snap.sha256, f"--weights {file}")
            width = snap.power_average.width if snap.power_average else None
            subject = {"weights": f"{name}@{snap.step}", "ema_width": width, "images": snap.images, "captions": captions}
            rows += [row for row, _ in evaluator.evaluate(model, snap.sha256, subject)]
        accelerator.print(evaluator.evaluation.write_report())
        evaluator.evaluation.print_existing()
        accelerator.wait_for_everyone()
    write_rows_file(args, accelerator, rows)
    print_summary(args, accelerator, out, f"sample as in the last row with: {suggested_sample(args, paths[-1], plan[-1])}")


def plan_of(
    args, snap: snapshot.Snapshot, model: FlowModel, labels: tuple[int, ...] | None, prompts: tuple[str, ...] | None,
    guide_name: str | None,
) -> list[SamplerSettings]:  # fmt: skip
    """The sampler of each row. Raises UserError for what does not fit the network."""
    plan = []
    some_guided = any(w != 1 for w in args.guidance_scale)  # else the flags of guidance are errors
    for scale in args.guidance_scale:
        for method in args.methods:
            options = flags.solver_options(args, method, args.methods)
            for steps in flags.num_steps(args, method):
                words = commands.condition_flags(1 if args.guide_weights else scale, (prompts or ())[:8]) + args.overrides
                times = grid_store.times_of(args.time_grid, snap, method, steps, words)
                sampler = SamplerSettings(
                    method, steps, scale, seed=args.seed, labels=labels, prompts=prompts, time_grid=args.time_grid, times=times,
                    options=options, source=args.source,
                )  # fmt: skip
                if scale != 1 or not some_guided:
                    sampler = replace(sampler, guidance_interval=tuple(args.guidance_interval), guide=guide_name)
                with args.naming_flags("evaluate"):
                    validate(sampler, model)
                plan.append(sampler)
    return plan


def suggested_sample(args, weights: Path, row: SamplerSettings) -> str:
    """The command that samples as in this row."""
    words = ["--sampling_method", row.method, "--sampling_steps", str(row.steps), "--time_grid", row.time_grid]
    words += commands.condition_flags(row.guidance_scale, (row.prompts or ())[:8])
    words += args.typed("guidance_interval", "guide_weights") if row.guidance_scale != 1 else []
    words += commands.option_flags(row.options)
    words += args.typed("labels") if not row.prompts else []
    words += [*args.typed("source"), "--seed", str(args.seed), *args.typed("config", "mixed_precision")]
    return commands.sample_command(weights, f"{weights.stem}_{row.method}_{row.steps}", *words, *args.overrides)


def evaluate_folder(args, accelerator: Accelerator) -> None:
    """One row for the images of a folder, by sample.py (whose labels are known) or from elsewhere."""
    data, stored = folders.read_folder(args.samples)
    settings = evaluation_settings(args, f"--samples {args.samples}", len(data))
    folder = args.samples.resolve()
    out = args.out or (folder / "evaluation" if stored else folder.with_name(f"{folder.name}_evaluation"))
    with lock.folder(out, accelerator):
        config = loading.load(args.config, args.overrides)
        rows = folders.write_row(settings, accelerator, out, args.samples, config, data, stored, names_training(args))
    write_rows_file(args, accelerator, rows)
    show = f"cat {shlex.quote(str(out / 'results.md'))}"
    print_summary(args, accelerator, out, f"see the table again with: {show}")


def names_training(args) -> bool:
    """Whether the command says what the generator of a folder was trained on."""
    return bool(args.config) or "data.name" in loading.overridden(args.overrides)


def write_rows_file(args, accelerator: Accelerator, rows: list[dict]) -> None:
    if args.rows_file and accelerator.is_main_process:
        results.write(args.rows_file, rows)


def print_summary(args, accelerator: Accelerator, out: Path, next_step: str) -> None:
    if accelerator.is_main_process:
        names = sorted(p.name for p in out.iterdir() if p.name != files.LOCK)
        print(messages.summary(f"{' '.join(names)} in {out}", args.start, next_step))


def default_number(model: FlowModel, repeats: int) -> int:
    """Images per row without --n_samples: a flow from data starts at each sample once."""
    count = sources.number_of_starts(model.source)
    return N_SAMPLES if count is None else max(2, min(N_SAMPLES, count // repeats))


def evaluation_settings(args, owner: str, n_samples: int) -> runner.EvaluationSettings:
    return runner.EvaluationSettings(
        owner=owner, n_samples=n_samples, n_samples_key="--n_samples", repeats=args.repeats, batch_size=args.bspp,
        feature_extractor=args.feature_extractor, feature_layer=args.feature_layer, feature_weights=args.feature_weights,
        allow_remote_code=args.allow_remote_code, reference=args.reference, metrics=tuple(args.metrics),
        control=not args.no_control,
    )  # fmt: skip


if __name__ == "__main__":
    cli_main(main, CONTINUES)
