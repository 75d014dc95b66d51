"""A training step as one CUDA graph.

In a small network the processor takes longer to start a kernel than the GPU to run it. A graph starts all of them with one call
(docs/performance.md). `torch.cuda.make_graphed_callables` would leave out the optimizer, which starts almost as many kernels as
the network.
"""

from collections.abc import Callable
from dataclasses import replace

import torch
from accelerate import Accelerator
from torch import Tensor

from configs.errors import UserError, first_line
from configs.schema import TrainConfig
from flow.losses import Batch, Loss, Losses

# The micro-batches and the learning rate; the losses, the norm of the gradient, and whether the weights changed
Update = Callable[[list[Batch], float | Tensor], tuple[list[Losses], Tensor, bool]]

EAGER_STEPS = 3  # before the capture: they create the state of the optimizer, and let cuDNN choose its kernels


def is_possible(accelerator: Accelerator, config: TrainConfig, loss: Loss) -> bool:
    """Whether train.cuda_graph applies: one GPU, a capturable loss, and no step that waits for the GPU to be skipped or not."""
    return (
        config.cuda_graph
        and accelerator.device.type == "cuda"
        and accelerator.num_processes == 1
        and accelerator.scaler is None
        and config.nonfinite_grad == "raise"
        and loss.capturable
    )


class GraphedUpdate:
    """An `Update` that runs as it is three times, is captured in the fourth, and replayed from then on.

    The kernels are the same, and so is every bit. The tensors that come back are overwritten by the next call.
    """

    def __init__(self, update: Update):
        self.update, self.calls = update, 0
        self.lr = torch.zeros((), device="cuda")
        self.graph: torch.cuda.CUDAGraph | None = None

    def __call__(self, micro_batches: list[Batch], lr: float | Tensor) -> tuple[list[Losses], Tensor, bool]:
        """Raises UserError where the network or the loss waits for the GPU, which a graph cannot hold."""
        self.lr.fill_(lr)
        self.calls += 1
        if self.calls <= EAGER_STEPS:
            return self.update(micro_batches, self.lr)
        if self.graph is None:
            self.graph = self._capture(micro_batches)
        for static, batch in zip(self.inputs, micro_batches, strict=True):
            for target, value in zip(_tensors(static), _tensors(batch), strict=True):
                target.copy_(value)
        self.graph.replay()
        return self.outputs

    def _capture(self, micro_batches: list[Batch]) -> torch.cuda.CUDAGraph:
        self.inputs = [_cloned(batch) for batch in micro_batches]
        graph = torch.cuda.CUDAGraph()
        try:
            # thread_local: the thread that makes the next batch may go on with its copies
            with torch.cuda.graph(graph, capture_error_mode="thread_local"):
                self.outputs = self.update(self.inputs, self.lr)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            raise UserError(f"train.cuda_graph=true: this step cannot be captured ({first_line(error)}); use false") from error
        return graph


def _cloned(batch: Batch) -> Batch:
    noise = {key: value.clone() for key, value in batch.noise.items()}
    x0, y, u = (None if value is None else value.clone() for value in (batch.x0, batch.y, batch.u))
    return replace(batch, x1=batch.x1.clone(), x0=x0, y=y, u=u, noise=noise)


def _tensors(batch: Batch) -> list[Tensor]:
    """What a capturable loss reads."""
    return [value for value in (batch.x1, batch.x0, batch.y, batch.u, *batch.noise.values()) if value is not None]
