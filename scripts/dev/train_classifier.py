"""Train one of the two classifiers that serve as feature extractors: `python -m scripts.dev.train_classifier --name mnist`.

Writes flow/evaluation/<name>.safetensors with the accuracy on held-out images in its header. Evaluation depends on
these files: train them again only to change the measure itself.
"""

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor
from torchvision.transforms.v2 import RandomAffine
from tqdm import trange

import datasets
from flow.evaluation.classifiers import SIDES, Classifier, weights_file
from flow.runtime import cli, subprocesses
from flow.runtime.errors import cli_main

EXAMPLES = "  FLOW_DATA=data python -m scripts.dev.train_classifier --name mnist"


BATCH = 128


EPOCHS = {"digits": 100, "mnist": 6}


def main() -> None:
    parser = cli.Parser(__doc__, EXAMPLES)
    parser.add_argument("--name", choices=tuple(SIDES), required=True)
    cli.add_count_flag(parser, "--epochs", "passes over the data (default: 100 for digits, 6 for mnist)")
    cli.add_seed_flag(parser, 0, "weights and order")
    args = parser.parse()
    epochs = args.epochs or EPOCHS[args.name]
    train_x, train_y, test_x, test_y = split(args.name, args.seed)

    torch.manual_seed(args.seed)
    net = Classifier(SIDES[args.name])
    steps = epochs * len(train_x) // BATCH
    optimizer = torch.optim.AdamW(net.parameters(), lr=2e-3, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps)
    augment = RandomAffine(degrees=8, translate=(0.08, 0.08), scale=(0.92, 1.08))
    for _ in trange(steps, desc=args.name):
        indices = torch.randint(len(train_x), (BATCH,))
        loss = F.cross_entropy(net(augment(train_x[indices])), train_y[indices])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    correct = accuracy(net, test_x, test_y)
    header = {"test_accuracy": f"{correct:.4f}", "test_images": str(len(test_x)), "epochs": str(epochs)}
    save_file(net.state_dict(), weights_file(args.name), metadata=header)
    result = f"{weights_file(args.name)}: accuracy {correct:.2%} on {len(test_x)} held-out images"
    print(cli.summary(result, args.start, f"run the tests with: {subprocesses.command('-m', 'pytest')}"))


def split(name: str, seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Training and held-out images, float32 [N, 1, H, W] in [0, 1], and labels [N]."""
    if name == "digits":  # one set of 1,797: a random sixth is held out
        data = datasets.build("digits", None, {})
        order = torch.randperm(len(data), generator=torch.Generator().manual_seed(seed))
        test, train = order[: len(data) // 6], order[len(data) // 6 :]
        x, y = data.images.float() / 255, data.labels
        return x[train], y[train], x[test], y[test]
    train, test = (datasets.build(name, None, {"train": part}) for part in (True, False))
    return train.images.float() / 255, train.labels, test.images.float() / 255, test.labels


@torch.inference_mode()
def accuracy(net: Classifier, x: Tensor, y: Tensor) -> float:
    net.eval()
    return (torch.cat([net(part) for part in x.split(1000)]).argmax(1) == y).float().mean().item()


if __name__ == "__main__":
    cli_main(main)
