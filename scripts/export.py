"""Export of weights: a smaller file, a folder for the Hugging Face hub, a graph for other runtimes.

--out writes a snapshot in half the size, its weights rounded to fp16: samples of it differ by rounding alone. --to writes a
folder in the form of the hub (weights, configuration, model card, a picture of samples), --push uploads it. Every script takes
the file, the folder and hf:owner/name as --weights. --onnx and --torch_export write the whole sampler, --sampling_steps steps
of a solver with classifier-free guidance, as one graph, and compare its images with those of the sampler here.
"""

import tempfile
from pathlib import Path

from torch.export import ExportedProgram

from configs.errors import UserError
from flow.model import FlowModel
from flow.runtime import cli, commands, flags, messages
from flow.runtime.errors import cli_main, error_context
from flow.sampling import exported, graph, grid_store, hub, locate, snapshot
from flow.sampling.settings import SamplerSettings
from flow.sampling.snapshot import Snapshot
from flow.solvers import FIXED_GRID, time_grids

EXAMPLES = """\
  python -m scripts.export --weights runs/mnist --out mnist.safetensors
  python -m scripts.export --weights runs/mnist --to exports/mnist --license cc-by-4.0
  python -m scripts.export --weights runs/mnist --push hf:owner/mnist-flow --private
  python -m scripts.export --weights runs/mnist --onnx mnist.onnx --torch_export mnist.pt2 --sampling_steps 4"""
DTYPE = "fp16"
FLAGS_OF = {  # the targets that each flag is for
    **dict.fromkeys(("sampling_steps", "sampling_method", "time_grid"), ("onnx", "torch_export")),
    "dtype": ("out", "to", "push"), "license": ("to", "push"), "private": ("push",),
}  # fmt: skip


def parse_args():
    parser = cli.Parser(__doc__, EXAMPLES)
    flags.add_weights_flag(parser)
    flags.add_output_flag(parser, use="a new .safetensors file", metavar="FILE", required=False)
    flags.add_output_flag(parser, "--to", use="a new folder in the form of the Hugging Face hub", required=False)
    parser.add_argument("--push", metavar="hf:OWNER/NAME", help="upload that folder; needs `hf auth login` or HF_TOKEN")
    parser.add_argument("--private", action="store_true", help="--push: a new repository is private")
    parser.add_argument("--license", metavar="ID", help="--to, --push: of the weights (default: unknown)")
    parser.add_argument("--dtype", choices=exported.DTYPES, help=f"--out, --to, --push: precision (default: {DTYPE})")
    use = "a new .onnx file of the sampler; needs requirements-onnx.txt"
    flags.add_output_flag(parser, "--onnx", use, "FILE", required=False)
    flags.add_output_flag(parser, "--torch_export", use="a new .pt2 file of the sampler", metavar="FILE", required=False)
    flags.add_count_flag(parser, "--sampling_steps", "steps of the graph")
    parser.add_argument("--sampling_method", choices=FIXED_GRID, help="solver of the graph (default: euler)")
    parser.add_argument("--time_grid", choices=[*time_grids.GRIDS, "optimized"], help="times of the graph (default: uniform)")
    return parser.parse()


def main() -> None:
    args = parse_args()
    targets = {flag: getattr(args, flag) for flag in ("out", "to", "push", "onnx", "torch_export")}
    if not any(targets.values()):
        raise UserError(f"give at least one of {', '.join(f'--{flag}' for flag in targets)}")
    for flag in ("out", "onnx", "torch_export"):
        if targets[flag] and targets[flag].exists():
            raise UserError(f"--{flag} {targets[flag]}: exists already; name another file")
    graphs = args.onnx or args.torch_export
    for flag, of in FLAGS_OF.items():
        if getattr(args, flag) and not any(targets[target] for target in of):
            raise UserError(f"--{flag}: goes with {' and '.join(f'--{target}' for target in of)}")
    if graphs and not args.sampling_steps:
        raise UserError("--sampling_steps: --onnx and --torch_export need it")
    if args.push:
        hub.check_push(args.push)
    if args.license:
        exported.check_license(args.license)
    if args.onnx:
        graph.check_packages()
    snap = snapshot.load(args.weights, None, args.overrides)
    sampler = build_graph(args, snap) if graphs else None  # before anything is written
    results = []
    weights = args.push or args.to or args.out or args.weights
    if args.to or args.push:  # first, as it may be refused
        results.append(write_folder(args, snap))
    if args.out:
        exported.write_weights(args.out, snap, args.dtype or DTYPE)
        sizes = [path.stat().st_size / 2**20 for path in (args.out, snap.path)]
        results.append(f"{args.out}: {sizes[0]:.1f} MiB instead of {sizes[1]:.1f} MiB")
    if sampler:
        results += write_graphs(args, snap, *sampler)
    moved = weights != args.weights and snap.codec is not None
    autoencoder = (snap.config.data.autoencoder or snap.codec["source"]) if moved and snap.codec else None
    places = exported.source_overrides(snap) if weights != args.weights else []
    words = [*exported.sample_flags(snap, autoencoder), *dict.fromkeys([*places, *([] if moved else args.overrides)])]
    sample = commands.sample_command(weights, locate.name_of(weights), *words)
    print(messages.summary(", ".join(results), args.start, f"sample from it with: {sample}"))


def write_folder(args, snap: Snapshot) -> str:
    """Write the folder and upload it; what became of it."""
    for key, place in exported.places(snap).items():
        print(f"note: whoever gets the export can read {commands.override(key, place)} in its configuration")
    with tempfile.TemporaryDirectory() as temporary:
        folder: Path = args.to or Path(temporary) / "export"
        is_new = exported.write_folder(
            folder, snap, args.dtype or DTYPE, args.license or exported.UNKNOWN, args.push or exported.PLACEHOLDER
        )
        if args.push:
            return f"uploaded to {hub.push(folder, args.push, args.private)}"
    return f"{folder}" if is_new else f"{folder} (there already)"


def build_graph(args, snap: Snapshot) -> tuple[SamplerSettings, FlowModel, ExportedProgram]:
    """The settings of the graph, and what `graph.build` makes of them. Raises UserError as it does."""
    method = args.sampling_method or "euler"
    steps = args.sampling_steps
    time_grid = args.time_grid or "uniform"
    times = grid_store.load(snap, method, steps) if time_grid == "optimized" else None
    scale = grid_store.fitted_scale(snap, method, steps) if times else None
    if scale is not None and snap.config.model.args.get("num_classes"):  # else the graph takes no scale
        print(f"note: the grid of {method} with {steps} steps was fitted at w = {scale:g}; give the graph this guidance_scale")
    settings = SamplerSettings(method, steps, time_grid=time_grid, times=times)
    with error_context("export"):
        return settings, *graph.build(snap, settings)


def write_graphs(args, snap: Snapshot, settings: SamplerSettings, model: FlowModel, program: ExportedProgram) -> list[str]:
    """Write the graph in each form; what became of them."""
    results = []
    for path, write in ((args.torch_export, graph.write_torch), (args.onnx, graph.write_onnx)):
        if path:
            difference = write(path, snap, settings, model, program)
            size = path.stat().st_size / 2**20
            results.append(f"{path}: {size:.1f} MiB, at most {difference:.2g} gray levels from the sampler")
    return results


if __name__ == "__main__":
    cli_main(main)
