"""The grid of samples that a run writes as it trains."""

from pathlib import Path

import torch
from accelerate import Accelerator
from torch import nn

from flow.engine import images, runtime
from flow.engine.generate import SamplerSettings, generate

BATCH = 16  # small, so that several processes share a grid


def write_preview(
    accelerator: Accelerator, net: nn.Module, image_shape: tuple[int, int, int], settings: SamplerSettings, n: int, path: Path
) -> None:
    """Sample images 0 .. n - 1 on all processes and write them as one PNG on the main process."""
    mine = [(batch.indices.start, batch.images) for batch in generate(accelerator, net, image_shape, range(n), BATCH, settings)]
    shares = runtime.gather_to_main(accelerator, mine)
    if shares is not None:
        ordered = sorted((item for share in shares for item in share), key=lambda item: item[0])
        path.parent.mkdir(parents=True, exist_ok=True)
        columns = max(1, round(n**0.5)) if net.num_classes is None else net.num_classes
        images.write_png(path, images.grid(torch.cat([pixels for _, pixels in ordered]), columns))
