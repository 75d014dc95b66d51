"""The real images that samples are compared with, and their features."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from accelerate import Accelerator

from configs.errors import UserError, first_line
from configs.schema import Config
from datasets import DataSet, DataSpec
from datasets.places import default_root
from flow.evaluation import feature_cache
from flow.evaluation.features import Extractor, FeatureSet
from flow.evaluation.metrics_2d import PointExtractor
from flow.runtime import distributed
from flow.runtime.errors import error_context
from flow.sampling import named_data
from flow.sampling.space import Space


@dataclass
class RealImages:
    """The real images of a reference."""

    name: str  # in tables
    spec: DataSpec
    data: DataSet
    root: Path  # of the cache
    flag: str  # what an error about an image names


def load_real_images(
    choice: str | None, accelerator: Accelerator, image_shape: tuple[int, ...], config: Config, flag: str = "--reference"
) -> RealImages | None:
    """The real images that samples of this shape are compared with; None for an npz file, which holds statistics alone.

    Args:
        choice: the value of --reference; None: the training set of the configuration.
        flag: what an error names.
    """
    root = Path(config.data.root) if config.data.root else default_root()
    if choice and choice.endswith(".npz"):
        if Space(image_shape).is_points:
            raise UserError(f"{flag} {choice}: points are compared with toys:SHAPE, not with statistics")
        return None
    with error_context(flag):
        if choice is None:
            spec = DataSpec.of(config.data).behind()
            root = Path(spec.root) if spec.root else root
        else:
            spec = named_data.spec_of(choice, root, image_shape)
        data = distributed.main_process_first(accelerator, spec.build)
        for note in data.notes if choice else ():  # a training has printed those of its own data
            accelerator.print(f"note: {note}")
        name = choice or (f"toys {spec.args['name']}" if spec.name == "toys" else spec.name)
        if data.image_shape[1:] != image_shape[1:]:
            raise ValueError(f"{name} has images of {data.image_shape[1:]} pixels, the samples {image_shape[1:]}")
    return RealImages(name, spec, data, root, flag if choice else "data")


def load_features(
    accelerator: Accelerator, extractor: Extractor | PointExtractor, batch_size: int, data: DataSet, source: RealImages,
    what: str, layers: Sequence[str], order: Sequence[int] | None = None,
) -> tuple[str, FeatureSet | None]:  # fmt: skip
    """The identity of these features, and on the main process they themselves, from the cache where they are there."""
    fingerprint = data.fingerprint() + (
        "" if order is None else f" {hashlib.sha256(json.dumps(list(order)).encode()).hexdigest()[:16]}"
    )
    identity = feature_cache.identity_of(fingerprint, extractor, layers)
    distributed.check_same(accelerator, identity, f"{source.name}, its images")
    path = source.root / "features" / f"{source.spec.name}-{extractor.name}-{extractor.layer}-{identity}.npz"
    features = feature_cache.cached(accelerator, extractor, data, identity, path, batch_size, what, source.flag, layers, order)
    return identity, features


def build_if_present(accelerator: Accelerator, spec: DataSpec, purpose: str) -> DataSet | None:
    """The data set; None on every process where one lacks its files, with a warning: "no `purpose`". Raises UserError that
    names the purpose for a damaged one."""

    def load() -> DataSet | str:
        try:
            return spec.build()
        except FileNotFoundError as error:
            return str(error)
        except ValueError as error:
            raise UserError(f"{purpose}: {first_line(error)}") from error

    data = distributed.main_process_first(accelerator, load)
    if distributed.any_process(accelerator, isinstance(data, str)):
        accelerator.print(f"warning: no {purpose}: {data if isinstance(data, str) else 'another process lacks them'}")
        return None
    return data
