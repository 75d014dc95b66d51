"""A snapshot in half the size, its weights rounded to fp16: `python -m scripts.export --weights runs/mnist --out FILE`.

Samples of it differ by rounding alone; every script takes it as any other snapshot.
"""

import torch

from configs.schema import UserError
from flow.runtime import cli
from flow.runtime.errors import cli_main
from flow.sampling import snapshot

EXAMPLES = "  python -m scripts.export --weights runs/mnist --out mnist.safetensors"


def parse_args():
    parser = cli.Parser(__doc__, EXAMPLES)
    cli.add_weights_flag(parser)
    cli.add_output_flag(parser, use="the new .safetensors file", metavar="FILE")
    return parser.parse()


def main() -> None:
    args = parse_args()
    if args.out.exists():
        raise UserError(f"--out {args.out}: exists already; name another file")
    snap = snapshot.load(args.weights, None, args.overrides)
    for name, value in snap.weights.items():
        half = value.half() if value.is_floating_point() else value
        if value.is_floating_point() and not torch.isfinite(half).all():
            raise UserError(f"--weights {snap.path}: {name} has values beyond the range of fp16")
        snap.weights[name] = half
    snapshot.save(
        args.out, snap.weights, snap.config, snap.image_shape, snap.step, snap.half_life_images, snap.codec, snap.class_names,
        snap.power_average,
    )  # fmt: skip
    sizes = [path.stat().st_size / 2**20 for path in (args.out, snap.path)]
    result = f"{args.out}: {sizes[0]:.1f} MiB instead of {sizes[1]:.1f} MiB"
    print(cli.summary(result, args.start, f"sample from it with: {cli.sample_command(args.out, args.out.stem)}"))


if __name__ == "__main__":
    cli_main(main)
