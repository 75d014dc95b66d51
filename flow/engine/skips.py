"""The optimizer's step, left out where the gradient is not finite: by the loss scaler of fp16, or by train.not_finite=skip."""

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from configs.schema import UserError
from flow.engine.sharding import whole
from flow.engine.tracker import Meter

IN_A_ROW = 50  # so many skipped steps mean that there is nothing more to learn
LEAST_SCALE = 1.0  # of fp16: below it the gradient overflows without any scaling


class Skips:
    """Counts the steps that changed nothing. All processes see the same gradient, so they agree on each step."""

    def __init__(self, accelerator: Accelerator, not_finite: str):
        self.accelerator = accelerator
        self.scaler = accelerator.scaler
        self.by_us = not_finite == "skip" and self.scaler is None  # fp16 has its own way, which also lowers its scale
        self.scale: float | None = None  # of fp16, after the last step
        self.in_a_row = 0

    def update(self, model: nn.Module, optimizer: torch.optim.Optimizer, max_norm: float, meter: Meter, step: int) -> bool:
        """Clip the gradient to max_norm (0: not at all), take step number `step` unless it has to be left out, and forget the
        gradient; whether the weights changed."""
        norm = whole(self.accelerator.clip_grad_norm_(model.parameters(), max_norm or float("inf")))
        taken = self.take(optimizer, norm)
        meter.add_grad_norm(step, norm, taken)
        optimizer.zero_grad()
        return taken

    def take(self, optimizer: torch.optim.Optimizer, norm: Tensor) -> bool:
        """Take the step with a gradient of this norm, unless it has to be left out; whether the weights changed.

        The device is waited for only with fp16 and with train.not_finite=skip. Whether fp16 skipped is told by its scale,
        which falls then: accelerate looks whether the optimizer's step was called, and that of a fused one always is.
        """
        if self.scaler is not None:
            before = self.scaler.get_scale() if self.scale is None else self.scale
            optimizer.step()
            self.scale = self.scaler.get_scale()
            taken = self.scale >= before
        else:
            taken = not self.by_us or bool(torch.isfinite(norm))
            if taken:
                optimizer.step()
        self.in_a_row = 0 if taken else self.in_a_row + 1
        return taken

    def metrics(self) -> dict[str, float]:
        """The loss scale of fp16; nothing without one."""
        return {"loss_scale": self.scale} if self.scale is not None else {}

    def check(self, step: int, newest: str) -> None:
        """Raises UserError where the run only skips: many steps in a row, or a loss scale that has collapsed."""
        if self.in_a_row >= IN_A_ROW:
            problem = (
                f"the gradients of the last {self.in_a_row} steps up to {step} were not finite, and all of them were skipped"
            )
        elif self.scale is not None and self.scale < LEAST_SCALE:
            problem = f"the loss scale of fp16 has collapsed to {self.scale:g} at step {step}"
        else:
            return
        raise UserError(f"{problem}; {newest}. A smaller optimizer.lr or train.mixed_precision=bf16 may help")
