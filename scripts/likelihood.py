"""Bits per dimension of real images under a flow: `python -m scripts.likelihood --weights runs/mnist --n_images 100`.

Pixels are dequantized uniformly over bins of width one centered on their levels; the divergence is Hutchinson's estimate with
`--hutchinson_samples` random signs an image. Image k of the data set has the same dequantization and signs in every run.
Points, which have no levels, get their log-likelihood in nats a point.
"""

import math
import sys
from collections.abc import Sequence

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor

from configs.errors import UserError
from datasets import DataSet, DataSpec
from flow.evaluation.intervals import mean_standard_error
from flow.likelihood import bits_per_dimension, check_density_known, dequantize, log_likelihood, random_directions
from flow.model import FlowModel
from flow.noise import generator
from flow.runtime import cli, commands, distributed, flags, messages
from flow.runtime.errors import cli_main, error_context
from flow.sampling import snapshot
from flow.sampling.generate import build_velocity, shard, to_solver_dtype
from flow.sampling.settings import SamplerSettings, validate
from flow.sampling.space import Space
from flow.training.checks import check_same_data

EXAMPLES = "  python -m scripts.likelihood --weights runs/mnist --n_images 200 --test"


def parse_args():
    parser = cli.Parser(__doc__, EXAMPLES)
    flags.add_weights_flag(parser)
    flags.add_count_flag(parser, "--n_images", "the first of the data set", 100, least=2)
    flags.add_count_flag(parser, "--hutchinson_samples", "random directions per image", 1)
    parser.add_argument("--rtol", type=float, default=1e-3, help="of dopri5 (default: 1e-3)")
    parser.add_argument("--atol", type=float, default=1e-3, help="of dopri5 (default: 1e-3)")
    parser.add_argument("--test", action="store_true", help="images that were held out of the training")
    flags.add_batch_size_flag(parser, 50)
    flags.add_seed_flag(parser, 0, "dequantization and random directions")
    return parser.parse()


def main() -> None:
    args = parse_args()
    accelerator = distributed.build_accelerator()  # first: processes agree on a revision of the hub
    snap = snapshot.load(args.weights, None, args.overrides)
    distributed.check_same(accelerator, snap.sha256, f"--weights {args.weights}")
    model = snap.model(decode=False)
    if model.net.max_prompt_bytes:
        raise UserError(f"--weights {args.weights}: reads prompts, which the images do not have; give a flow without them")
    with error_context(f"--weights {args.weights}"):
        check_density_known(model.source)
    if snap.codec:
        raise UserError(f"--weights {args.weights}: gives no likelihood of images, as it works on latents")
    data = real_images(args, accelerator, snap)
    distributed.prepare_model(model.net, accelerator)
    model.net.eval().requires_grad_(False)
    parts = distributed.gather_to_main(accelerator, log_likelihoods(args, accelerator, model, data))
    if parts is not None:
        values, nfes = zip(*(batch for part in parts for batch in part), strict=True)
        print_result(args, torch.cat(values), nfes, data)


def real_images(args, accelerator: Accelerator, snap: snapshot.Snapshot) -> DataSet:
    """The images, or points, that the flow was trained on; with --test those that were held out. Raises UserError where there
    are too few, and for those of another shape."""
    snap.check_data()
    with error_context("data"):
        spec = DataSpec.of(snap.config.data).behind()
        if args.test:
            other = spec.held_out()
            if other is None:
                raise UserError(f"--test: data.name={spec.name}, data.args={spec.args} has no held-out images; leave it out")
            spec = other.spec
        data = distributed.main_process_first(accelerator, spec.build)
        check_same_data(accelerator, spec.name, data)
    if data.image_shape != snap.image_shape:
        raise UserError(f"data: {spec.name} has images of {data.image_shape}, --weights is of {snap.image_shape}")
    if args.n_images > len(data):
        raise UserError(f"--n_images {args.n_images}: the data set has {len(data)}; use at most {len(data)}")
    return data


def log_likelihoods(args, accelerator: Accelerator, model: FlowModel, data: DataSet) -> list[tuple[Tensor, int]]:
    """For each batch of this process log p [B] of its dequantized images, or of its points, in nats, and its NFE."""
    batches = shard(accelerator, range(args.n_images), args.bspp)
    points = Space(data.image_shape).is_points
    results = []
    with distributed.progress(accelerator, sum(map(len, batches)), "likelihood (images of this process)") as bar:
        for batch in batches:
            with error_context("data"):
                samples, labels = zip(*(data[k] for k in batch), strict=True)
            u = torch.from_numpy(np.stack([generator("likelihood", args.seed, k).random(data.image_shape) for k in batch]))
            directions = random_directions(args.seed, batch, data.image_shape, args.hutchinson_samples)
            real = torch.stack(samples)
            x1 = to_solver_dtype(real if points else dequantize(real, u), accelerator.device)
            settings = SamplerSettings(labels=tuple(labels) if model.net.num_classes else None)
            with error_context("data"):
                validate(settings, model)
            velocity = build_velocity(model, range(len(batch)), settings, accelerator.device)
            with error_context("likelihood"):
                log_p, _, nfe = log_likelihood(velocity, x1, eps=directions.to(x1), rtol=args.rtol, atol=args.atol)
            results.append((log_p.cpu().double(), nfe))
            bar.update(len(batch))
    return results


def print_result(args, log_p: Tensor, nfes: Sequence[int], data: DataSet) -> None:
    """The mean over all images in bits per dimension, or over points in nats, with its standard error; and the NFE of the
    batches, each of which has its own steps."""
    points = Space(data.image_shape).is_points
    values = log_p if points else bits_per_dimension(log_p, math.prod(data.image_shape))
    error = mean_standard_error(values.numpy())  # of two values at least
    least, most = min(nfes), max(nfes)
    nfe = str(most) if least == most else f"{least} to {most}"
    unit = "nats a point, log-likelihood" if points else "bits per dimension"
    result = (
        f"{values.mean().item():.4f} ± {error:.4f} {unit} (mean ± standard error over {len(values)} "
        f"{'points' if points else 'images'}; dopri5, rtol {args.rtol:g}, atol {args.atol:g}, NFE {nfe}, "
        f"{args.hutchinson_samples} Hutchinson sample(s)"
        f"{'' if points else ', uniform dequantization, bins centered on the levels'})"
    )
    more = ["--hutchinson_samples", str(4 * args.hutchinson_samples)]
    command = commands.command("-m", "scripts.likelihood", *sys.argv[1:], *more)
    print(messages.summary(result, args.start, f"estimate the divergence more closely with: {command}"))


if __name__ == "__main__":
    cli_main(main)
