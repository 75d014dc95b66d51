"""The training and sampling loops that a user would write without this project, for `scripts/benchmark.py --against eager`.

fp32, a DataLoader with two workers, torch.optim.AdamW, averages by a Python loop over the parameters, loss.item() in each
step; sampling by Euler's method, batch after batch, each image saved by torchvision. Both yield after every step or batch,
so that whoever iterates can take the time.
"""

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import nn
from torch.utils.data import DataLoader, RandomSampler, TensorDataset
from torchvision.utils import save_image


def train(net: nn.Module, images: torch.Tensor, labels: torch.Tensor | None, batch_size: int, lr: float) -> Iterator[None]:
    """Endless training of net(x, t, y) on uint8 images [N, C, H, W], labels int64 [N] or None."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    net.to(device).train()
    averages = [p.detach().clone() for p in net.parameters()]
    optimizer = torch.optim.AdamW(net.parameters(), lr=lr)
    floats = images.float() / 127.5 - 1
    data = TensorDataset(floats, torch.zeros(len(floats), dtype=torch.long) if labels is None else labels)
    sampler = RandomSampler(data, replacement=True, num_samples=2**62)
    for x1, y in DataLoader(data, batch_size=batch_size, sampler=sampler, num_workers=2):
        x1, y = x1.to(device), y.to(device)
        x0 = torch.randn_like(x1)
        t = torch.rand(len(x1), device=device)
        xt = t[:, None, None, None] * x1 + (1 - t[:, None, None, None]) * x0
        loss = ((net(xt, t, None if labels is None else y) - (x1 - x0)) ** 2).mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        with torch.no_grad():
            for average, p in zip(averages, net.parameters(), strict=True):
                average.mul_(0.9999).add_(p, alpha=1 - 0.9999)
        loss.item()
        yield


@torch.no_grad()
def sample(
    net: nn.Module, image_shape: tuple[int, int, int], classes: int | None, batch_size: int, steps: int, folder: Path
) -> Iterator[None]:
    """Endless batches of PNG files in `folder`, by Euler steps."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    net.to(device).eval()
    made = 0
    while True:
        x = torch.randn(batch_size, *image_shape, device=device)
        y = torch.arange(batch_size, device=device) % classes if classes else None
        for i in range(steps):
            x = x + net(x, torch.full((batch_size,), i / steps, device=device), y) / steps
        for image in x:
            save_image((image + 1) / 2, folder / f"{made:06d}.png")
            made += 1
        yield
