"""A sampler as one graph for other runtimes: all steps of a solver, unrolled, in a file of ONNX or of torch.export.

Inputs: `noise` float32 [B, C, H, W] (points: [B, 2]) and, of a network with labels, `labels` int64 [B] and `guidance_scale`,
a float32 scalar. The output `images` is float32 [B, C, H, W] in [-1, 1] (points: `points`, as they are). The batch size is
free. A file gets its name only after its images have been compared with those of the sampler here.
"""

import importlib
import json
import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from configs.errors import UserError, first_line
from flow import solvers
from flow.guidance import GuidedVelocity
from flow.model import FlowModel
from flow.runtime import files
from flow.sampling import digest
from flow.sampling.generate import sample_batch
from flow.sampling.settings import SamplerSettings, build_time_grid
from flow.sampling.snapshot import Snapshot

MAX_DIFFERENCE = 2.0  # gray levels of 255, between a graph and the sampler here
MAX_ONNX_BYTES = 2**31 - 1  # of a file of protocol buffers
ONNX_PACKAGES = ("onnx", "onnxscript", "onnxruntime")
CHECKS = ((1, 1.0), (3, 2.0))  # (batch size, guidance scale) of the images that are compared


class SamplerGraph(nn.Module):
    """The sampler of fixed times, as a module that torch.export can trace: no value decides what is computed."""

    def __init__(self, model: FlowModel, settings: SamplerSettings):
        """model: without decoder and guide. settings: of a method of solvers.FIXED_GRID; scale and labels are not used."""
        super().__init__()
        self.model, self.net, self.method = model, model.net, settings.method
        self.times = build_time_grid(settings, model.path)

    def forward(self, noise: Tensor, labels: Tensor | None = None, guidance_scale: Tensor | float = 1.0) -> Tensor:
        """Images [B, C, H, W] in [-1, 1], or points [B, 2]."""
        velocity = GuidedVelocity(self.model, labels, self.model.net.null, guidance_scale)
        x = solvers.solve(velocity, noise, self.times, self.method).x
        return x.clamp(-1, 1) if x.dim() == 4 else x


def build(snap: Snapshot, settings: SamplerSettings) -> tuple[FlowModel, ExportedProgram]:
    """The model of a snapshot, on the CPU, and the graph of its sampler.

    Raises:
        UserError: for latents, prompts, methods without a fixed number of steps, and a network that torch cannot trace.
    """
    source = f"--weights {snap.path}"
    if snap.codec:
        raise UserError(f"{source}: a flow on latents has no graph, as its autoencoder is another model; use sample.py")
    if settings.method not in solvers.FIXED_GRID:
        able = ", ".join(solvers.FIXED_GRID)
        raise UserError(f"--sampling_method {settings.method}: must be one of {able} for a graph")
    model = snap.model()
    if model.net.max_prompt_bytes:
        raise UserError(f"{source}: a network that reads prompts has no graph; use sample.py")
    model.eval()
    batch = Dim("batch", min=1)
    inputs = _inputs(model, range(3), 2.0)
    shapes = ({0: batch}, {0: batch}, None)  # of noise, labels and scale
    try:
        with torch.no_grad():
            program = torch.export.export(SamplerGraph(model, settings), inputs, dynamic_shapes=shapes[: len(inputs)])
    except Exception as error:  # torch raises errors of many kinds for what it cannot trace
        raise UserError(f"{source}: torch.export cannot trace {snap.config.model.name}: {first_line(error)}") from error
    return model, program


def write_torch(path: Path, snap: Snapshot, settings: SamplerSettings, model: FlowModel, program: ExportedProgram) -> float:
    """Write the graph for `torch.export.load(path).module()`, with extra file metadata.json.

    Returns:
        The largest difference to the sampler here, in gray levels (points: in 1/127.5).

    Raises:
        UserError: where it is too large; the file is not written then.
    """
    with files.atomic_file(path) as temporary:
        with open(temporary, "wb") as file:
            torch.export.save(program, file, extra_files={"metadata.json": json.dumps(metadata(snap, settings), indent=1)})
        with open(temporary, "rb") as file:
            module = torch.export.load(file).module()
        return _check(f"--torch_export {path}", snap, settings, model, lambda *inputs: module(*inputs))


def write_onnx(path: Path, snap: Snapshot, settings: SamplerSettings, model: FlowModel, program: ExportedProgram) -> float:
    """Write the graph as ONNX, as `write_torch` does; the comparison runs onnxruntime on the CPU. The metadata are entries of
    the model.

    Raises:
        UserError: as `write_torch`, and where the packages are missing or the weights exceed the 2 GiB of an ONNX file.
    """
    check_packages()
    if sum(value.numel() * 4 for value in snap.weights.values()) > MAX_ONNX_BYTES:
        raise UserError(f"--onnx {path}: these weights are larger than the 2 GiB of an ONNX file; use --torch_export")
    import onnxruntime

    names = ["noise", "labels", "guidance_scale"][: 3 if model.net.num_classes is not None else 1]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about its own versions
        converted = torch.onnx.export(
            program, (), dynamo=True, input_names=names, output_names=[output_name(snap)], verbose=False
        )
    assert converted is not None
    converted.model.metadata_props.update({key: str(value) for key, value in metadata(snap, settings).items()})
    with files.atomic_file(path) as temporary:
        converted.save(temporary, external_data=False)
        session = onnxruntime.InferenceSession(temporary, providers=["CPUExecutionProvider"])

        def run(*inputs: Tensor) -> Tensor:
            [output] = session.run(None, {name: value.numpy() for name, value in zip(names, inputs, strict=True)})
            return torch.from_numpy(output)

        return _check(f"--onnx {path}", snap, settings, model, run)


def check_packages() -> None:
    """Raises UserError where one of the packages for ONNX is missing."""
    for name in ONNX_PACKAGES:
        try:
            importlib.import_module(name)
        except ImportError:
            raise UserError(f"--onnx: needs the package {name}: pip install -r requirements-onnx.txt") from None


def output_name(snap: Snapshot) -> str:
    return "points" if snap.space.is_points else "images"


def metadata(snap: Snapshot, settings: SamplerSettings) -> dict[str, Any]:
    """What a user of a graph has to know: texts, numbers, and lists as JSON."""
    return {
        "class_names": json.dumps(snap.class_names, ensure_ascii=False),
        "image_shape": json.dumps(snap.decoded_shape),
        "sampling_method": settings.method,
        "sampling_steps": settings.steps,
        "time_grid": settings.time_grid,
        "weights_digest": digest.stored_and_actual(snap.path)[1],
        "training_step": snap.step,
        "training_images": snap.images,
    }


def _inputs(model: FlowModel, indices: Sequence[int], scale: float) -> tuple[Tensor, ...]:
    """Noise, and with labels those of the classes in turn and the scale."""
    noise = model.draw_x0("sample", SamplerSettings.seed, indices)
    classes = model.net.num_classes
    if classes is None:
        return (noise,)
    return noise, torch.tensor([k % classes for k in indices]), torch.tensor(scale)


def _check(key: str, snap: Snapshot, settings: SamplerSettings, model: FlowModel, run: Callable[..., Tensor]) -> float:
    """The largest difference between a graph and the sampler here, in gray levels. Raises UserError where it is too large."""
    differences = []
    for size, scale in CHECKS:
        inputs = _inputs(model, range(size), scale)
        exact = replace(settings, guidance_scale=scale if len(inputs) > 1 else 1.0)
        with torch.inference_mode():
            expected = sample_batch(model, range(size), exact, torch.device("cpu")).x
            actual = run(*inputs)
        expected = expected if snap.space.is_points else expected.clamp(-1, 1)
        differences.append((actual - expected).abs().max().item() * 127.5)
    worst = math.nan if any(map(math.isnan, differences)) else max(differences)  # max() alone may leave a NaN out
    if not worst <= MAX_DIFFERENCE:
        raise UserError(f"{key}: its images differ from those of the sampler by {worst:.2f} gray levels; not written")
    return worst
