"""The optimizer, its learning rate, and the steps that are skipped where the gradient is not finite."""

import math
from typing import Any, NoReturn

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from configs.errors import UserError
from configs.schema import OptimizerConfig
from flow.runtime import distributed
from flow.runtime.errors import error_context
from flow.runtime.sharding import is_sharded
from flow.training.muon import MuonWithAdamW, match_layout

MAX_SKIPPED_IN_A_ROW = 50  # so many skipped steps mean that there is nothing more to learn
DECAY_SHARE = 0.2  # of schedule wsd
MIN_LOSS_SCALE = 1.0  # of fp16: below it the gradient overflows without any scaling


def lr_at(config: OptimizerConfig, update: int, total: int) -> float:
    """lr of update number `update` (from 0) of `total`: linear warm-up from 0, then constant, linear or cosine to 0.

    With wsd it is constant until the last DECAY_SHARE of the updates after the warm-up, and then linear to 0: warm-up, stable,
    decay (Hu et al. 2024, arXiv:2404.06395) with the linear cooldown of Hägele et al. 2024 (arXiv:2405.18392).
    """
    warmup = min(1.0, (update + 1) / config.warmup_steps) if config.warmup_steps else 1.0
    progress = min(1.0, max(0, update - config.warmup_steps) / max(1, total - config.warmup_steps))
    cooldown = min(1.0, (1 - progress) / DECAY_SHARE)
    decay = {"constant": 1.0, "linear": 1 - progress, "cosine": (1 + math.cos(math.pi * progress)) / 2, "wsd": cooldown}
    return config.lr * warmup * decay[config.schedule]


def warmup_note(config: OptimizerConfig, total: int) -> str | None:
    """A line for a training that ends before its learning rate has reached its peak; None for others."""
    if config.warmup_steps < total:
        return None
    return (
        f"optimizer.warmup_steps={config.warmup_steps}: the learning rate rises to the last of {total} steps, and "
        f"optimizer.schedule={config.schedule} has no effect"
    )


def set_options(optimizer: torch.optim.Optimizer, config: OptimizerConfig, accelerator: Accelerator) -> None:
    """Give an optimizer whose state was loaded the options and memory format of this configuration and device: its own are
    those of the checkpoint."""
    for group in optimizer.param_groups:
        group.update(_options(config, accelerator))
    match_layout(optimizer)


def build_optimizer(net: nn.Module, config: OptimizerConfig, accelerator: Accelerator) -> torch.optim.Optimizer:
    """The optimizer of a network on its device; its learning rate is then that of `lr_at` at each step.

    Raises:
        UserError: for optimizer.name=muon where the network has nothing for it, or is sharded.
    """
    fused = accelerator.device.type in ("cpu", "cuda")
    if config.name == "muon":
        if accelerator.is_fsdp2:
            raise UserError("optimizer.name=muon: needs whole matrices, FSDP2 shards them; use adamw")
        with error_context("optimizer"):
            return MuonWithAdamW(net, config.lr, fused, muon_dtype(), **_options(config, accelerator))
    return torch.optim.AdamW(net.parameters(), lr=config.lr, fused=fused, **_options(config, accelerator))


def muon_dtype() -> torch.dtype:
    """The precision in which Muon is fast on the machine of the main process: machines may differ, replicas must not."""
    precision = distributed.decided_by_main(lambda: distributed.resolve_precision("auto"))
    return torch.bfloat16 if precision == "bf16" else torch.float32


def _options(config: OptimizerConfig, accelerator: Accelerator) -> dict[str, Any]:
    return {
        "betas": tuple(config.betas),
        "eps": config.eps,
        "weight_decay": config.weight_decay,
        "capturable": accelerator.device.type == "cuda",  # by a CUDA graph
    }


class OptimizerStep:
    """Clips the gradient and takes the step of the optimizer, skips it where the gradient is not finite, and counts the steps
    that were skipped. All processes see the same gradient, so they agree on each step."""

    def __init__(self, net: nn.Module, optimizer: torch.optim.Optimizer, accelerator: Accelerator, config: Any):
        """net, optimizer: as Accelerate prepared them. config: a `Config` or `VaeConfig`."""
        self.net, self.optimizer, self.accelerator = net, optimizer, accelerator
        self.max_norm = config.optimizer.clip_grad_norm or math.inf
        self.scaler = accelerator.scaler
        # The scaler of fp16 skips by itself, and lowers its scale.
        self.skips_nonfinite = config.train.nonfinite_grad == "skip" and self.scaler is None
        self.scale: float | None = None  # of fp16, after the last step
        self.in_a_row = 0

    def clip_and_step(self) -> tuple[Tensor, bool]:
        """The norm of the gradient before clipping, and whether the weights changed. Zeroes the gradient.

        Waits for the device only with fp16 and with train.nonfinite_grad=skip. Whether fp16 skipped the step shows in its
        scale, which falls then: Accelerate only checks whether `step` of the optimizer was called, and with a fused one it
        always is.
        """
        norm = self.accelerator.clip_grad_norm_(self.net.parameters(), self.max_norm)
        norm = norm.full_tensor() if is_sharded(norm) else norm
        if self.scaler is not None:
            before = self.scaler.get_scale() if self.scale is None else self.scale
            self.optimizer.step()
            self.scale = self.scaler.get_scale()
            updated = self.scale >= before
        else:
            updated = not self.skips_nonfinite or bool(torch.isfinite(norm))
            if updated:
                self.optimizer.step()
        self.in_a_row = 0 if updated else self.in_a_row + 1
        self.optimizer.zero_grad()
        return norm, updated

    def metrics(self) -> dict[str, float]:
        """The loss scale of fp16; nothing without one."""
        return {"loss_scale": self.scale} if self.scale is not None else {}

    @property
    def only_skips(self) -> bool:
        """Whether nothing is learned any more: many skipped steps in a row, or a loss scale that has collapsed."""
        return self.in_a_row >= MAX_SKIPPED_IN_A_ROW or (self.scale is not None and self.scale < MIN_LOSS_SCALE)

    def fail(self, step: int, hint: str) -> NoReturn:
        """Raises UserError for a run that `only_skips`."""
        if self.in_a_row >= MAX_SKIPPED_IN_A_ROW:
            message = (
                f"the gradients of the last {self.in_a_row} steps up to {step} were not finite, and all of them were skipped"
            )
        else:
            message = f"the loss scale of fp16 has collapsed to {self.scale:g} at step {step}"
        raise UserError(f"{message}; {hint}. A smaller optimizer.lr or train.mixed_precision=bf16 may help")
