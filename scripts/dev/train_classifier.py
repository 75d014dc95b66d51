"""Train one of the classifiers that serve as feature extractors: `python -m scripts.dev.train_classifier --name mnist`.

Writes flow/evaluation/<name>.safetensors with the accuracy on held-out images in its header. Evaluation depends on
these files: train them again only to change the measure itself.
"""

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn
from torchvision.transforms.v2 import RandomAffine
from tqdm import trange

import datasets
from flow.evaluation import classifiers
from flow.evaluation.classifiers import SIDES, weights_file
from flow.runtime import cli, commands, flags, messages
from flow.runtime.errors import cli_main
from flow.training.muon import MuonWithAdamW
from flow.training.optimizer import muon_dtype

EXAMPLES = "  FLOW_DATA=data python -m scripts.dev.train_classifier --name mnist"
BATCH = 128
EPOCHS = {"digits": 100, "mnist": 6, "cifar10": 10}
MAX_SHIFT = 4  # pixels, of cifar10


def main() -> None:
    parser = cli.Parser(__doc__, EXAMPLES)
    parser.add_argument("--name", choices=tuple(SIDES), required=True)
    epochs_text = ", ".join(f"{count} for {name}" for name, count in EPOCHS.items())
    flags.add_count_flag(parser, "--epochs", f"passes over the data (default: {epochs_text})")
    flags.add_seed_flag(parser, 0, "weights and order")
    args = parser.parse(takes_keys=False)
    epochs = args.epochs or EPOCHS[args.name]
    train_x, train_y, test_x, test_y = split(args.name, args.seed)

    torch.manual_seed(args.seed)
    net = classifiers.build(args.name)
    steps = epochs * len(train_x) // BATCH
    color = args.name == "cifar10"
    if color:
        net = net.to(memory_format=torch.channels_last)
        lr, augment = 6e-3, flipped_and_shifted
        optimizer: torch.optim.Optimizer = MuonWithAdamW(net, lr, True, muon_dtype(), weight_decay=2e-2)
    else:
        lr = 2e-3
        augment = RandomAffine(degrees=8, translate=(0.08, 0.08), scale=(0.92, 1.08))
        optimizer = torch.optim.AdamW(net.parameters(), lr=lr, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps, cycle_momentum=not color)
    with trange(steps, desc=args.name) as bar:
        for step in bar:
            indices = torch.randint(len(train_x), (BATCH,))
            with torch.autocast("cpu", torch.bfloat16, enabled=color):
                logits = net(augment(train_x[indices]))
            loss = F.cross_entropy(logits.float(), train_y[indices], label_smoothing=0.1 * color)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            if step % 100 == 0:
                bar.set_postfix(loss=f"{loss.item():.3f}")
    weights = {name: value.contiguous() for name, value in net.state_dict().items()}
    if color:  # half precision halves the file; the accuracy is that of the file
        weights = {name: value.half() if value.is_floating_point() else value for name, value in weights.items()}
        net.load_state_dict(weights)
    correct = accuracy(net, test_x, test_y)
    header = {"test_accuracy": f"{correct:.4f}", "test_images": str(len(test_x)), "epochs": str(epochs)}
    save_file(weights, weights_file(args.name), metadata=header)
    result = f"{weights_file(args.name)}: accuracy {correct:.2%} on {len(test_x)} held-out images"
    print(messages.summary(result, args.start, f"run the tests with: {commands.command('-m', 'pytest')}"))


def flipped_and_shifted(images: Tensor) -> Tensor:
    """Images [B, C, H, W], each mirrored with probability 1/2 and moved by up to MAX_SHIFT pixels, reflected at the edge."""
    b, _, height, width = images.shape
    padded = F.pad(images, [MAX_SHIFT] * 4, mode="reflect")
    dy, dx = torch.randint(2 * MAX_SHIFT + 1, (2, b, 1))
    rows, columns = dy + torch.arange(height), dx + torch.arange(width)  # [B, H], [B, W]
    columns = torch.where(torch.rand(b, 1) < 0.5, columns.flip(1), columns)
    return padded[torch.arange(b)[:, None, None], :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


def split(name: str, seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Training and held-out images, float32 [N, C, H, W] in [0, 1], and labels [N]."""
    if name == "digits":  # one set of 1,797: a random sixth is held out
        data = datasets.build("digits", None, {})
        order = torch.randperm(len(data), generator=torch.Generator().manual_seed(seed))
        test, train = order[: len(data) // 6], order[len(data) // 6 :]
        x = data.images.float() / 255
        y = data.labels
        return x[train], y[train], x[test], y[test]
    train, test = (datasets.build(name, None, {"train": part}) for part in (True, False))
    return train.images.float() / 255, train.labels, test.images.float() / 255, test.labels


@torch.inference_mode()
def accuracy(net: nn.Module, x: Tensor, y: Tensor) -> float:
    net.eval()
    return (torch.cat([net(part) for part in x.split(1000)]).argmax(1) == y).float().mean().item()


if __name__ == "__main__":
    cli_main(main)
