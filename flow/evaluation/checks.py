"""What would end an evaluation, found before the training that it comes after."""

from pathlib import Path

from accelerate import Accelerator

from configs.errors import UserError
from configs.schema import Config
from datasets import DataSpec
from flow.evaluation import reference
from flow.evaluation.real_images import load_real_images
from flow.evaluation.runner import EvaluationSettings, load_extractor
from flow.runtime import distributed
from flow.runtime.errors import error_context
from flow.sampling import sources
from flow.sampling.space import Space
from flow.source import Source


def check_evaluation(
    settings: EvaluationSettings, accelerator: Accelerator, config: Config, shape: tuple[int, ...], source: Source
) -> None:
    """Load the feature extractor and the reference for flows from this source to images (C, H, W), or points (2,).

    Raises UserError where they are not to be had or do not fit the images, and as `check_number_of_starts` does.
    """
    check_number_of_starts(settings, source)
    extractor, dimension = load_extractor(settings, accelerator, shape)
    if load_real_images(settings.reference, accelerator, shape, config) is None:
        with error_context("evaluate"):
            reference.from_npz(Path(str(settings.reference)), extractor, dimension)


def check_before_training(config: Config, settings: EvaluationSettings) -> None:
    """`check_evaluation` for a training that has not begun, on the CPU: the GPU is for the training.

    Raises UserError for its data, too.
    """
    with error_context("data"):
        data = DataSpec.of(config.data).build()
    shape, flow = Space(data.image_shape, data.codec).decoded_shape, config.flow.source
    with distributed.cpu_accelerator() as accelerator:
        check_evaluation(settings, accelerator, config, shape, sources.build(flow.name, config.data.root, flow.args))


def check_number_of_starts(settings: EvaluationSettings, source: Source) -> None:
    """Raises UserError where a flow from data would have to start at a sample twice: images from the same start are no
    independent samples, so that intervals would be too short, and recall would be near 0."""
    with error_context("flow.source"):
        count = sources.number_of_starts(source)
    n, repeats, key = settings.n_samples, settings.repeats, settings.n_samples_key
    if count is not None and n * repeats > count:
        setting = f"{key} {n}" if key.startswith("--") else f"{key}={n}"
        most = f"with --repeats {repeats} at most {count // repeats}" if repeats > 1 else f"at most {count}"
        raise UserError(f"{setting}: the flow starts at {count:,} samples of {source.name}; {most}")
