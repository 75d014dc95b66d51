"""Sample images from trained weights: `accelerate-launch sample.py --weights runs/mnist --n_samples 100 --save_dir samples`.

Image k depends on the weights, the settings and k, not on the number of processes (with methods that have tolerances a
little on its batch, so --bspp must stay the same). An interrupted run resumes. `--save_dir` gets images/
(PNG), grid.png, sampling.json, with --npz samples.npz and, where a flow starts at files, starts.csv with their names.
"""

from pathlib import Path

from accelerate import Accelerator

from configs.errors import UserError
from flow.model import FlowModel
from flow.runtime import cli, commands, distributed, files, flags, lock, messages
from flow.runtime.errors import CONTINUES, cli_main, printable
from flow.sampling import grid_store, guide, images, named_data, output, snapshot, sources
from flow.sampling.settings import SamplerSettings, guidance_note, validate
from flow.sampling.snapshot import Snapshot
from flow.solvers import SOLVERS

EXAMPLES = """\
  accelerate-launch sample.py --weights runs/mnist --n_samples 100 --save_dir samples/mnist --sampling_steps 50
  accelerate-launch sample.py --weights runs/digits --n_samples 40 --save_dir samples/threes --labels 3 --guidance_scale 2
  accelerate-launch sample.py --weights runs/digits --n_samples 40 --save_dir samples/guided --guidance_scale 2 \\
      --guidance_interval 0.2 0.8
  accelerate-launch sample.py --weights runs/mnist_text --n_samples 20 --save_dir samples/prompts --guidance_scale 3 \\
      --prompts "a handwritten three" "数字7"
  accelerate-launch --multi_gpu --num_processes 8 sample.py --weights runs/cifar10 --n_samples 50000 --save_dir samples/50k \\
      --sampling_method heun --sampling_steps 18 --bspp 500 -mp bf16"""


def parse_args():
    parser = cli.Parser(__doc__, EXAMPLES)
    flags.add_config_flag(parser)
    flags.add_weights_flag(parser)
    flags.add_count_flag(parser, "--n_samples", "number of images; where a flow starts at data, all of its starts by default")
    flags.add_output_flag(parser, "--save_dir")
    flags.add_method_flag(parser, SOLVERS, "euler")
    flags.add_step_flags(parser, [100], several=False)
    flags.add_solver_flags(parser)
    flags.add_batch_size_flag(parser)
    flags.add_seed_flag(parser)
    flags.add_source_flag(parser)
    flags.add_labels_flag(parser)
    flags.add_prompts_flag(parser)
    flags.add_guidance_flags(parser)
    flags.add_precision_flag(parser)
    flags.add_compile_flag(parser)
    parser.add_argument("--grid_by_class", action="store_true", help="grid.png: a row, not a column, for each class or prompt")
    parser.add_argument("--npz", action="store_true", help="also write samples.npz: arr_0 [N, H, W, C], labels [N]")
    return parser.parse()


def main() -> None:
    args = parse_args()
    accelerator = distributed.build_accelerator(args.mixed_precision)  # first: processes agree on a revision of the hub
    snap = snapshot.load(args.weights, args.config, args.overrides)
    distributed.check_same(accelerator, snap.sha256, f"--weights {args.weights}")
    model = snap.model()
    guide_name = guide.attach(model, snap, args.guide_weights)
    source_note = sources.attach(accelerator, model, args.source, snap.config.data.root, args.n_samples or 0)
    args.n_samples = args.n_samples or sources.number_of_starts(model.source)
    if args.n_samples is None:
        raise UserError("--n_samples: how many images? This flow starts at noise")
    settings = settings_of(args, snap, guide_name)
    with args.naming_flags("sample"):
        check_request(args, snap, model, settings)
    notes = (guidance_note(settings, model), source_note, grid_store.fit_note(snap, settings), snap.space.channels_note)
    for note in filter(None, notes):
        accelerator.print(f"note: {note}")
    with lock.folder(args.save_dir, accelerator):
        if accelerator.is_main_process:
            output.check_output_dir(args.save_dir, snap, model, settings, accelerator.mixed_precision, args.bspp)
            if not snap.space.is_points:
                images_folder(args).mkdir(exist_ok=True)
        accelerator.wait_for_everyone()
        for network in model.networks:
            distributed.prepare_model(network, accelerator, args.compile)
        write = write_points if snap.space.is_points else write_image_folder
        write(args, accelerator, snap, model, settings)


def settings_of(args, snap: Snapshot, guide_name: str | None) -> SamplerSettings:
    labels = flags.labels_of(args.labels, snap.class_names)
    method = args.sampling_method
    [steps] = flags.num_steps(args, method)
    words = commands.condition_flags(1 if args.guide_weights else args.guidance_scale, args.prompts) + args.overrides
    times = grid_store.times_of(args.time_grid, snap, method, steps, words)
    return SamplerSettings(
        method, steps, args.guidance_scale, seed=args.seed, labels=labels,
        prompts=tuple(args.prompts) if args.prompts else None, time_grid=args.time_grid, times=times,
        options=flags.solver_options(args, method, [method]),
        guidance_interval=tuple(args.guidance_interval), guide=guide_name, source=args.source,
    )  # fmt: skip


def check_request(args, snap: Snapshot, model: FlowModel, settings: SamplerSettings) -> None:
    """Raises ValueError for settings and flags that the network cannot serve."""
    validate(settings, model)
    labels = settings.labels
    classes = len(snap.class_names)
    if settings.prompts and labels and not all(0 <= label < classes for label in labels):
        raise ValueError(f"--labels {' '.join(args.labels)}: with --prompts they are classes, from 0 to {classes - 1}")
    if not snap.space.is_points and (channels := snap.space.decoded_shape[0]) > images.MAX_CHANNELS:
        most = f"a PNG file has at most {images.MAX_CHANNELS}"
        raise ValueError(f"--weights: makes images of {channels} channels, {most}; use Sampler.sample (docs/python.md)")
    if args.grid_by_class and snap.space.is_points:
        raise ValueError("--grid_by_class: is for images, and --weights is a flow of points")
    if args.grid_by_class and not (settings.prompts or model.net.num_classes):
        raise ValueError("--grid_by_class: this network was trained without labels (model.args.num_classes)")


def images_folder(args) -> Path:
    return args.save_dir / named_data.IMAGES


def write_points(args, accelerator: Accelerator, snap: Snapshot, model: FlowModel, settings: SamplerSettings) -> None:
    """Write samples.npz and grid.png of a flow of points."""
    indices = range(args.n_samples)
    points, nfe = output.sample_points(accelerator, model, indices, args.bspp, settings)
    if points is None:  # not the main process
        return
    output.write_npz(args.save_dir / "samples.npz", points.numpy(), settings, model.net.num_classes)
    images.write_png(args.save_dir / "grid.png", images.scatter_image(points))
    study = files.free_folder(args.save_dir / "study")
    compare = ["-m", "scripts.solver_study", "--weights", args.weights, "--out", study]
    result = f"{args.n_samples} points in {args.save_dir / 'samples.npz'} and grid.png, NFE {nfe}"
    words = args.typed("config", "seed")
    print(messages.summary(result, args.start, f"compare solvers with: {commands.command(*compare, *words, *args.overrides)}"))


def write_image_folder(args, accelerator: Accelerator, snap: Snapshot, model: FlowModel, settings: SamplerSettings) -> None:
    """Write images/, grid.png and, with --npz, samples.npz."""
    folder, indices = images_folder(args), range(args.n_samples)
    nfe, forwards = output.write_images(accelerator, model, indices, args.bspp, settings, folder, snap.space.decoded_shape)
    if not accelerator.is_main_process:
        return
    write_grid_and_npz(args, snap, settings, model.net.num_classes)
    images_there = range(max(args.n_samples, len(list(folder.glob("*.png")))))  # an earlier call may have made more
    if names := sources.names_of_starts(model, images_there):
        output.write_starts(args.save_dir / "starts.csv", folder, names)
    cost = f"NFE {nfe} ({forwards} network calls) per image" if nfe else "none of them new"
    result = f"{args.n_samples} images in {folder} and {args.save_dir / 'grid.png'}, {cost}"
    animate = ["-m", "scripts.animate", "--weights", args.weights, "--out", args.save_dir / "animation"]
    conditions = ["prompts"] if args.prompts else ["labels"]
    guidance = ["guidance_scale", "guidance_interval", "guide_weights"]
    words = args.typed("config", *guidance, *conditions, "seed", "source")
    command = commands.command(*animate, *words, *args.overrides)
    print(messages.summary(result, args.start, f"watch images form with: {command}"))


def write_grid_and_npz(args, snap: Snapshot, settings: SamplerSettings, num_classes: int | None) -> None:
    """Write grid.png and, with --npz, samples.npz of the images."""
    folder, indices = images_folder(args), range(args.n_samples)
    files.clean_temporaries(folder)
    grid = args.save_dir / "grid.png"
    for line in output.write_grid(grid, folder, indices, settings, snap.class_names, num_classes, args.grid_by_class):
        print(f"in grid.png: {printable(line)}")
    npz = args.save_dir / "samples.npz"
    if npz.is_file() and not args.npz:
        print(f"note: {npz} is of an earlier call; --npz writes it again")
    if args.npz:
        output.write_npz(npz, output.read_pngs(folder, indices), settings, num_classes)


if __name__ == "__main__":
    cli_main(main, CONTINUES)
