"""The training and sampling loops that a user would write without this project, the baseline of scripts.benchmark.

`python -m scripts.benchmark.baseline -c CONFIG --minutes 25 --out FILE` trains with it, for tables of equal time
(scripts/benchmark/gpu_check.sh).

fp32, a DataLoader with two workers, torch.optim.AdamW, averages by a Python loop over the parameters, loss.item() in each
step; sampling by Euler's method, batch after batch, each image saved by torchvision. Both yield after every step or batch,
so that the caller can measure the time.
"""

import time
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, RandomSampler, TensorDataset
from torchvision.utils import save_image

import models
from configs import keys, loading, schema
from configs.errors import UserError
from configs.schema import Config
from datasets import DataSpec
from flow.model import set_defaults
from flow.runtime import cli, commands, distributed, flags, lock, messages
from flow.runtime.errors import cli_main, error_context
from flow.sampling import snapshot

EXAMPLES = "  python -m scripts.benchmark.baseline -c configs/cifar10_fast.yaml --minutes 25 --out plain.safetensors"


def parse_args():
    parser = cli.Parser(__doc__, EXAMPLES)
    flags.add_config_flag(parser, "its data, network, batch size and learning rate", required=True)
    parser.add_argument("--minutes", type=flags.positive, required=True, help="of training")
    flags.add_output_flag(parser, use="the new .safetensors file", metavar="FILE")
    return parser.parse()


def main() -> None:
    args = parse_args()
    if args.out.exists():
        raise UserError(f"--out {args.out}: exists already; name another file")
    cfg = loading.load(args.config, args.overrides)
    check_plain(cfg)
    with lock.unfinished(args.out):  # where nothing can be written, that is said before the training
        net, images, labels = load_network_and_data(cfg)
        step, averages = train_for(args.minutes, net, images, labels, cfg)
        names = [name for name, _ in net.named_parameters()]
        cfg.flow.label_dropout = 0.0  # this loop drops none, whatever the configuration says
        snapshot.save(args.out, dict(zip(names, averages, strict=True)), cfg, tuple(images.shape[1:]), step, 1)
    result = f"{args.out}: {step} steps of {cfg.train.batch_size} images"
    print(messages.summary(result, args.start, f"sample from it with: {commands.sample_command(args.out, args.out.stem)}"))


def check_plain(cfg: Config) -> None:
    """Raises UserError for a configuration that does not train plain flow matching, which the weights would claim."""
    plain = {"flow.path": "linear", "flow.prediction": "velocity", "flow.source.name": "gaussian",
             "flow.coupling": "independent", "loss.name": "flow_matching"}  # fmt: skip
    for key, value in plain.items():
        if keys.get(cfg, key) != value:
            raise UserError(f"{key}={keys.get(cfg, key)}: must be {value}, as the plain loop trains nothing else")
    if cfg.model.args.get("two_times"):
        raise UserError("model.args.two_times=true: must be false, as the plain loop gives the network one time")


def train_for(minutes: float, net: nn.Module, images: Tensor, labels: Tensor | None, cfg: Config) -> tuple[int, list[Tensor]]:
    """Train so long; the number of steps and the averages. The bar counts seconds."""
    accelerator = distributed.build_single_process_accelerator("baseline")
    seconds = 60 * minutes
    with distributed.progress(accelerator, round(seconds), "plain loop (seconds)") as bar:
        start = time.monotonic()
        for step, averages in enumerate(train(net, images, labels, cfg.train.batch_size, cfg.optimizer.lr), start=1):
            elapsed = time.monotonic() - start
            bar.set_postfix_str(f"step {step}", refresh=False)
            bar.update(min(int(elapsed), bar.total) - bar.n)
            if elapsed > seconds:
                return step, averages
    raise AssertionError("the training is endless")


def load_network_and_data(cfg: Config) -> tuple[nn.Module, Tensor, Tensor | None]:
    """The network, the images and the labels of a configuration. Raises UserError for what the loop cannot train."""
    with error_context("data"):
        data = DataSpec.of(cfg.data).build()
    schema.set_auto_classes(cfg, data.class_names if data.labels is not None else ())
    with error_context("model"):
        net = models.build(cfg.model.name, data.image_shape, cfg.model.args)
        set_defaults(net)
    if net.max_prompt_bytes or data.access != "memory" or data.images.dtype != torch.uint8:
        raise UserError(f"data.name={cfg.data.name}: the plain loop is for networks without prompts on images in memory")
    return net, data.images, data.labels if net.num_classes is not None else None


def train(net: nn.Module, images: Tensor, labels: Tensor | None, batch_size: int, lr: float) -> Iterator[list[Tensor]]:
    """Endless training of net(x, t, y) on uint8 images [N, C, H, W], labels int64 [N] or None; yields the averages."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    net.to(device).train()
    averages = [p.detach().clone() for p in net.parameters()]
    optimizer = torch.optim.AdamW(net.parameters(), lr=lr)
    floats = images.float() / 127.5 - 1
    data = TensorDataset(floats, torch.zeros(len(floats), dtype=torch.long) if labels is None else labels)
    sampler = RandomSampler(data, replacement=True, num_samples=2**62)
    loader = DataLoader(data, batch_size=batch_size, sampler=sampler, num_workers=2)
    for step, (x1, y) in enumerate(loader, start=1):
        x1, y = x1.to(device), y.to(device)
        x0 = torch.randn_like(x1)
        t = torch.rand(len(x1), device=device)
        xt = t[:, None, None, None] * x1 + (1 - t[:, None, None, None]) * x0
        loss = ((net(xt, t, None if labels is None else y) - (x1 - x0)) ** 2).mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        decay = min(0.9999, (1 + step) / (10 + step))  # so that a short training forgets its random start
        with torch.no_grad():
            for average, p in zip(averages, net.parameters(), strict=True):
                average.mul_(decay).add_(p, alpha=1 - decay)
        loss.item()
        yield averages


@torch.no_grad()
def sample(
    net: nn.Module, image_shape: tuple[int, int, int], classes: int | None, batch_size: int, steps: int, folder: Path
) -> Iterator[None]:
    """Endless batches of PNG files in `folder`, by Euler steps."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    net.to(device).eval()
    count = 0
    while True:
        x = torch.randn(batch_size, *image_shape, device=device)
        y = torch.arange(batch_size, device=device) % classes if classes else None
        for i in range(steps):
            x = x + net(x, torch.full((batch_size,), i / steps, device=device), y) / steps
        for image in x:
            save_image((image + 1) / 2, folder / f"{count:06d}.png")
            count += 1
        yield


if __name__ == "__main__":
    cli_main(main)
