"""A training step as one CUDA graph.

Small networks are bound by kernel launches: the CPU takes longer to launch a kernel than the GPU to run it. A graph launches
all of them with one call (docs/performance.md). `torch.cuda.make_graphed_callables` would leave out the optimizer, which
launches almost as many kernels as the network.
"""

from dataclasses import replace
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from configs.errors import UserError, first_line
from configs.schema import TrainConfig
from flow.losses import Batch, Loss
from flow.training.step import Step, StepOutput

EAGER_STEPS = 3  # before the capture: they create the state of the optimizer, and let cuDNN choose its kernels


def obstacle(accelerator: Accelerator, config: TrainConfig, loss: Loss) -> str | None:
    """Why a training step cannot be one CUDA graph; None where it can."""
    obstacles = {
        "train.cuda_graph=false": not config.cuda_graph,
        "there is no NVIDIA GPU": accelerator.device.type != "cuda",
        "there are several processes": accelerator.num_processes > 1,
        "fp16 skips steps, which the CPU has to decide": accelerator.scaler is not None,
        "train.nonfinite_grad=skip skips steps, which the CPU has to decide": config.nonfinite_grad != "raise",
        "this loss cannot be captured": not loss.capturable,
    }
    return next((reason for reason, applies in obstacles.items() if applies), None)


class GraphedStep:
    """A `Step` that runs as it is three times, is captured in the fourth, and replayed from then on.

    The kernels are the same, and so is every bit. The tensors that come back are overwritten by the next call.
    """

    def __init__(self, step: Step):
        self.plain_step = step
        self.calls = 0
        self.lr = torch.zeros((), device="cuda")
        self.graph: torch.cuda.CUDAGraph | None = None

    def __call__(self, micro_batches: list[Batch], lr: float | Tensor) -> StepOutput:
        """Raises UserError if the network or the loss waits for the GPU, which a graph cannot hold."""
        self.lr.fill_(lr)
        self.calls += 1
        if self.calls <= EAGER_STEPS:
            return self.plain_step(micro_batches, self.lr)
        if self.graph is None:
            self.graph = self._capture(micro_batches)
        for static, batch in zip(self.inputs, micro_batches, strict=True):
            for name, value in graph_inputs(batch).items():
                static[name].copy_(value)
        self.graph.replay()
        return self.outputs

    def _capture(self, micro_batches: list[Batch]) -> torch.cuda.CUDAGraph:
        self.inputs = [{name: value.clone() for name, value in graph_inputs(batch).items()} for batch in micro_batches]
        captured = [with_inputs(batch, inputs) for batch, inputs in zip(micro_batches, self.inputs, strict=True)]
        graph = torch.cuda.CUDAGraph()
        try:
            # thread_local: the thread that makes the next batch may go on with its copies
            with torch.cuda.graph(graph, capture_error_mode="thread_local"):
                self.outputs = self.plain_step(captured, self.lr)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            raise UserError(f"train.cuda_graph=true: this step cannot be captured ({first_line(error)}); use false") from error
        return graph


def graph_inputs(batch: Batch) -> dict[str, Tensor]:
    """The tensors that a capturable loss reads, by name."""
    own = {name: getattr(batch, name) for name in ("x1", "x0", "y", "uniforms")}
    noise = {f"noise.{key}": value for key, value in batch.noise.items()}
    return {name: value for name, value in (own | noise).items() if value is not None}


def with_inputs(batch: Batch, inputs: dict[str, Tensor]) -> Batch:
    """The batch with these tensors as its `graph_inputs`."""
    noise = {key: inputs[f"noise.{key}"] for key in batch.noise}
    own: dict[str, Any] = {name: value for name, value in inputs.items() if not name.startswith("noise.")}
    return replace(batch, noise=noise, **own)
