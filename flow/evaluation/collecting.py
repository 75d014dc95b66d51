"""The images of a process, and features collected from all processes."""

from collections.abc import Iterable, Iterator, Sequence

from accelerate import Accelerator
from torch import Tensor

from datasets import DataSet, reading
from flow.evaluation.features import Extractor, FeatureSet, merge
from flow.evaluation.metrics_2d import PointExtractor
from flow.runtime import distributed
from flow.runtime.errors import items_in_context
from flow.sampling.generate import shard


def read(
    data: DataSet, accelerator: Accelerator, batch_size: int, what: str, order: Sequence[int] | None = None, key: str = "data"
) -> Iterator[tuple[range, Tensor]]:
    """This process's share of the images of a data set, without augmentation, under a bar that says `what`.

    Image k is data[order[k]]; None: data[k]. An error names the `key`.
    """
    order = range(len(data)) if order is None else order
    batches = shard(accelerator, range(len(order)), batch_size)
    with distributed.progress(accelerator, sum(map(len, batches)), what) as bar:
        index_lists = [[order[k] for k in batch] for batch in batches]
        images = items_in_context(key, reading.read_batches(data, index_lists))
        for batch, (_, pixels) in zip(batches, images, strict=True):
            yield batch, pixels
            bar.update(len(batch))


def collect(
    accelerator: Accelerator,
    extractor: Extractor | PointExtractor,
    stream: Iterable[tuple[range, Tensor]],
    layers: Sequence[str] | None = None,
) -> FeatureSet | None:
    """The features of all images of all processes, on the main process; None on the others. `layers`: which ones are
    retained (None: all)."""
    features = FeatureSet()
    for indices, images in stream:
        outputs = extractor(images)
        features.add(extractor.layer, indices, {name: outputs[name] for name in layers or outputs})
    parts = distributed.gather_to_main(accelerator, features)
    return None if parts is None else merge(parts)
