"""Bits per dimension of real images under a flow: `python -m scripts.likelihood --weights runs/mnist --n_images 100`.

Pixels are dequantized uniformly over bins of width one centered on their levels; the divergence is Hutchinson's estimate with
`--hutchinson_samples` random signs an image. Image k of the data set has the same dequantization and signs in every run.
Points, which have no levels, get their log-likelihood in nats a point.
"""

import sys

import numpy as np
import torch

import datasets
from configs.errors import UserError
from flow.evaluation.intervals import mean_standard_error
from flow.likelihood import bits_per_dimension, check_density_known, dequantize, log_likelihood
from flow.noise import generator
from flow.runtime import cli, commands, distributed
from flow.runtime.errors import cli_main, error_context
from flow.sampling import snapshot
from flow.sampling.generate import build_velocity, shard, to_solver_dtype
from flow.sampling.settings import SamplerSettings, validate

EXAMPLES = "  python -m scripts.likelihood --weights runs/mnist --n_images 200 --test"


def parse_args():
    parser = cli.Parser(__doc__, EXAMPLES)
    cli.add_weights_flag(parser)
    cli.add_count_flag(parser, "--n_images", "the first of the data set", 100, least=2)
    cli.add_count_flag(parser, "--hutchinson_samples", "random directions per image", 1)
    parser.add_argument("--rtol", type=float, default=1e-3, help="of dopri5 (default: 1e-3)")
    parser.add_argument("--atol", type=float, default=1e-3, help="of dopri5 (default: 1e-3)")
    parser.add_argument("--test", action="store_true", help="images that were held out of the training")
    cli.add_batch_size_flag(parser, 50)
    cli.add_seed_flag(parser, 0, "dequantization and probes")
    return parser.parse()


def main() -> None:
    args = parse_args()
    accelerator = distributed.build_accelerator()  # first: processes agree on a revision of the hub
    snap = snapshot.load(args.weights, None, args.overrides)
    model = snap.model(decode=False)
    if model.net.max_prompt_bytes:
        raise UserError("--weights: the likelihood under a network with prompts is not defined by images and labels")
    with error_context("--weights"):
        check_density_known(model.source)
    if snap.codec:
        raise UserError("--weights: a flow on latents gives no likelihood of images")
    snap.check_data()
    source = snap.config.data
    with error_context("data"):
        real = datasets.source_dataset(source.name, source.root, source.args)
        if args.test:
            other = datasets.held_out(real)
            if other is None:
                raise UserError(
                    f"--test: data.name={real['name']}, data.args={real['args']} has no held-out images; leave it out"
                )
            real = other[1]
        data = distributed.main_process_first(accelerator, lambda: datasets.build(**real))
    if data.image_shape != snap.image_shape:
        raise UserError(f"data: {real['name']} has images of {data.image_shape}, --weights is of {snap.image_shape}")
    if args.n_images > len(data):
        raise UserError(f"--n_images {args.n_images}: the data set has {len(data)}")
    distributed.prepare_model(model.net, accelerator)
    model.net.eval().requires_grad_(False)
    batches = shard(accelerator, range(args.n_images), args.bspp)
    results, nfe = [], 0
    dimensions = int(np.prod(data.image_shape))
    points = snap.space.is_points
    with distributed.progress(accelerator, sum(map(len, batches)), "likelihood (images of this process)") as bar:
        for batch in batches:
            with error_context("data"):
                images, labels = zip(*(data[k] for k in batch), strict=True)
            draws = [generator("likelihood", args.seed, k) for k in batch]
            u = torch.from_numpy(np.stack([g.random(data.image_shape) for g in draws]))
            signs = np.stack(
                [g.integers(2, size=(args.hutchinson_samples, *data.image_shape)) * 2.0 - 1 for g in draws], axis=1
            )
            real = torch.stack(images)
            x1 = to_solver_dtype(real if points else dequantize(real, u), accelerator.device)
            settings = SamplerSettings(labels=tuple(labels) if model.net.num_classes else None)
            with error_context("data"):
                validate(settings, model)
            velocity = build_velocity(model, range(len(batch)), settings, accelerator.device)
            probes = to_solver_dtype(torch.from_numpy(signs), accelerator.device)
            with error_context("likelihood"):
                log_p, _, nfe = log_likelihood(velocity, x1, eps=probes, rtol=args.rtol, atol=args.atol)
            results += (log_p if points else bits_per_dimension(log_p, dimensions)).tolist()
            bar.update(len(batch))
    everything = distributed.gather_to_main(accelerator, results)
    if everything is not None:
        values = torch.tensor([value for part in everything for value in part])
        error = mean_standard_error(values.numpy())  # of two values at least
        unit = "nats a point, log-likelihood" if points else "bits per dimension"
        result = (
            f"{values.mean().item():.4f} ± {error:.4f} {unit} (mean ± standard error over {len(values)} "
            f"{'points' if points else 'images'}; dopri5, rtol {args.rtol:g}, atol {args.atol:g}, NFE {nfe} for the last "
            f"batch, {args.hutchinson_samples} Hutchinson sample(s)"
            f"{'' if points else ', uniform dequantization, bins centered on the levels'})"
        )
        more = ["--hutchinson_samples", str(4 * args.hutchinson_samples)]
        command = commands.command("-m", "scripts.likelihood", *sys.argv[1:], *more)
        print(cli.summary(result, args.start, f"estimate the divergence more closely with: {command}"))


if __name__ == "__main__":
    cli_main(main)
