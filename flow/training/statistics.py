"""What a training measures between two rows of its log: means of the loss, norms of the gradient, images per second."""

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from accelerate import Accelerator
from torch import Tensor

from configs.errors import UserError
from flow.losses import Losses

TIME_BINS = 10


class LossStatistics:
    """Means over the steps since the last `compute`, kept on the device so that a step needs no synchronization."""

    def __init__(self, device: torch.device, nonfinite_grad: str = "raise"):
        """nonfinite_grad: with "skip" a loss or gradient that is not finite is no part of the means; with "raise" `check`
        raises for it."""
        self.raises = nonfinite_grad == "raise"
        # Adam's arithmetic is float32 anyway; mps has no float64
        dtype = torch.float32 if device.type == "mps" else torch.float64
        self.sums = torch.zeros(2, TIME_BINS, device=device, dtype=dtype)  # loss and number of samples, by time bin
        self.terms: dict[str, Tensor] = {}  # sums by name
        self.by_time = True  # whether the samples have times
        self.grad_norms: list[Tensor] = []  # of the steps that were taken
        self.unchecked: list[tuple[int, Tensor]] = []  # steps, with sums of losses and norms that have to be finite

    def update(self, step: int, losses: Losses) -> None:
        """Add the losses [b] of a micro-batch of this step."""
        loss = losses.per_sample.detach()
        self.by_time = losses.t is not None
        t = losses.t if losses.t is not None else torch.zeros_like(loss)
        bins = (t * TIME_BINS).long().clamp_(0, TIME_BINS - 1)
        values = torch.stack([loss, torch.ones_like(loss)]).to(self.sums.dtype)
        terms = {name: value.detach() for name, value in losses.terms.items()}
        if self.raises:
            self.unchecked.append((step, values[0].sum()))
        else:
            finite = torch.isfinite(loss)
            values = torch.where(finite, values, 0)
            terms = {name: torch.where(finite, value, 0) for name, value in terms.items()}
        self.sums.index_add_(1, bins, values)
        for name, value in terms.items():
            total = value.sum(dtype=self.sums.dtype)
            self.terms[name] = self.terms[name] + total if name in self.terms else total

    def add_grad_norm(self, step: int, norm: Tensor, updated: bool) -> None:
        """The norm of a step's gradient; that of a step that was skipped is no part of the mean."""
        if not updated:
            return
        self.grad_norms.append(norm.detach().to(torch.float32, copy=True))  # a CUDA graph writes to that of the next step
        if self.raises:
            self.unchecked.append((step, self.grad_norms[-1]))

    def check(self, accelerator: Accelerator, hint: str) -> None:
        """Raises UserError on every process where a loss or gradient since the last check was not finite; it ends with
        `hint`."""
        values = torch.stack([value.to(self.sums.dtype) for _, value in self.unchecked]).tolist() if self.unchecked else []
        first = next((step for (step, _), value in zip(self.unchecked, values, strict=True) if not math.isfinite(value)), -1)
        self.unchecked.clear()
        if accelerator.num_processes > 1:
            steps = accelerator.gather(torch.tensor([first], device=self.sums.device))
            first = int(steps[steps >= 0].min()) if bool((steps >= 0).any()) else -1
        if first >= 0:
            raise UserError(
                f"the loss or gradient of step {first} is not finite; {hint}. A smaller optimizer.lr, "
                "train.mixed_precision=bf16 instead of fp16, or train.nonfinite_grad=skip may help"
            )

    def state(self, accelerator: Accelerator) -> dict:
        """The sums over all processes, for a checkpoint between two calls of `compute`."""
        return {
            "sums": accelerator.reduce(self.sums, "sum").tolist(),
            "terms": {name: accelerator.reduce(value, "sum").item() for name, value in self.terms.items()},
            "grad_norms": self._norms().tolist(),
        }

    def load_state(self, accelerator: Accelerator, state: dict) -> None:
        if accelerator.is_main_process:
            self.sums += torch.tensor(state["sums"], device=self.sums.device, dtype=self.sums.dtype)
        for name, value in state["terms"].items():
            self.terms[name] = self.sums.new_tensor(value if accelerator.is_main_process else 0.0)
        self.grad_norms = list(torch.tensor(state["grad_norms"], device=self.sums.device))

    def compute(self, accelerator: Accelerator) -> dict[str, float]:
        """Means of the loss, in each time bin that had samples, and of the terms; mean, median and largest of the gradient
        norms, whose spikes a mean hides; resets. What has no value, as all steps were skipped, is left out."""
        loss, count = accelerator.reduce(self.sums, "sum").tolist()
        terms = {name: accelerator.reduce(value, "sum").item() for name, value in self.terms.items()}
        norms = self._norms()
        self.sums.zero_()
        self.terms.clear()
        self.grad_norms.clear()
        num_samples = sum(count)
        metrics = {"loss": sum(loss) / num_samples} if num_samples else {}
        if self.by_time:
            metrics |= {f"loss_t_{i / TIME_BINS:.1f}": loss[i] / count[i] for i in range(TIME_BINS) if count[i]}
        metrics |= {name: total / num_samples for name, total in terms.items() if num_samples}
        if not len(norms):  # all steps were skipped
            return metrics
        median = norms.sort().values[(len(norms) - 1) // 2].item()
        return metrics | {"grad_norm": norms.mean().item(), "grad_norm_median": median, "grad_norm_max": norms.max().item()}

    def _norms(self) -> Tensor:
        """The gradient norms of the steps since the last `compute`, on the CPU."""
        return torch.stack(self.grad_norms).cpu() if self.grad_norms else torch.zeros(0)


class Throughput:
    """Images per second of training since the last reading; pauses do not count."""

    def __init__(self, batch_size: int, step: int):
        self.batch_size = batch_size
        self.step = step
        self.start = time.perf_counter()

    def read(self, step: int) -> float:
        seconds, steps = time.perf_counter() - self.start, step - self.step
        self.step = step
        self.start = time.perf_counter()
        return steps * self.batch_size / seconds

    @contextmanager
    def paused(self) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.start += time.perf_counter() - start
