"""The picture of samples that a run writes as it trains."""

from collections.abc import Sequence
from pathlib import Path

import torch
from accelerate import Accelerator

from flow.model import FlowModel
from flow.runtime import distributed
from flow.sampling import images
from flow.sampling.generate import generate, shard
from flow.sampling.settings import SamplerSettings

BATCH = 16  # small, so that several processes share a grid


POINT_BATCH = 1000


MAX_COLUMNS = 20  # of one class or prompt each


def write_preview(
    accelerator: Accelerator, model: FlowModel, image_shape: tuple[int, ...], settings: SamplerSettings, n: int, path: Path,
    class_names: Sequence[str] = (),
) -> None:  # fmt: skip
    """Sample images 0 .. n - 1 on all processes and write them as one PNG on the main process.

    Where there are 2 to 20 prompts or classes, each has a column under its name; a class without one has its number.
    """
    points = len(image_shape) == 1
    batches = shard(accelerator, range(n), POINT_BATCH if points else BATCH)
    generated = generate(accelerator, model, image_shape, batches, settings)
    mine = [(batch.indices.start, batch.images) for batch in generated]
    shares = distributed.gather_to_main(accelerator, mine)
    if shares is not None:
        ordered = sorted((item for shard in shares for item in shard), key=lambda item: item[0])
        path.parent.mkdir(parents=True, exist_ok=True)
        made = torch.cat([pixels for _, pixels in ordered])
        if points:
            images.write_png(path, images.scatter_image(made))
            return
        classes = range(model.net.num_classes or 0)
        names = list(settings.prompts or (class_names[k] if k < len(class_names) else str(k) for k in classes))
        if not 2 <= len(names) <= MAX_COLUMNS:
            names = []
        images.write_png(path, images.labelled_grid(made, len(names) or max(1, round(n**0.5)), names))
