"""Muon for the matrices of a network, AdamW for everything else, as one optimizer."""

import math
from collections.abc import Callable, Iterable
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn

MIN_SIDE = 32  # inputs and outputs of a hidden layer
CONDITIONING = {"conditioning", "modulation"}  # layers of the embedding of time and label, by their names in `models`
OUTER = (".embed", ".unembed", ".conv_in", ".conv_out", ".layers.0", ".last")  # ends of names of those that touch pixels


class MuonWithAdamW(torch.optim.Optimizer):
    """Orthogonalized momentum (Jordan et al. 2024, kellerjordan.github.io/posts/muon) for the weights of hidden linear layers
    and convolutions; AdamW for norms, biases, embeddings, the layers that touch pixels, and those of the embedding of time, on
    which Muon would cost as much as on the rest of a small U-Net. The last two kinds are known by their names (`OUTER`,
    `CONDITIONING`), which layers of your own network may have as well. AdamW also has matrices outside nn.Linear and
    nn.Conv2d: queries, keys and values of the text encoder and its convolution over bytes.

    A convolution counts as the matrix [outputs, inputs * height * width]. An orthogonal step is scaled by
    0.2 sqrt(max(rows, columns)) to the root mean square of a usual step of AdamW, so that both take the same learning rate and
    weight decay (Liu et al. 2025, arXiv:2502.16982).

    Parameters and gradients belong to the network; `Muon`, which takes matrices alone, works on views of them.
    """

    def __init__(self, net: nn.Module, lr: float, fused: bool, dtype: torch.dtype, **options: Any):
        """dtype: of Muon's arithmetic. options: of AdamW; Muon takes its weight_decay. Raises ValueError for a network without
        hidden matrices."""
        layers = {name: m for name, m in net.named_modules() if isinstance(m, nn.Linear | nn.Conv2d)}
        hidden = {id(m.weight) for name, m in layers.items() if is_hidden(name, m)}
        self.matrices = [p for p in net.parameters() if id(p) in hidden]
        if not self.matrices:
            raise ValueError(f"name=muon: the network has no hidden layer with {MIN_SIDE} inputs and outputs; use adamw")
        others = [p for p in net.parameters() if id(p) not in hidden]
        super().__init__([{"params": self.matrices}, {"params": others}], {"lr": lr, **options})
        self.views = [nn.Parameter(as_matrix(p.detach())) for p in self.matrices]
        self.muon = Muon(self.views, dtype)
        self.adamw = torch.optim.AdamW(others, fused=fused)

    def summary(self) -> str:
        """How many parameters each of the two trains, for the start of the log."""
        own, others = (sum(p.numel() for p in group["params"]) for group in self.param_groups)
        return f"optimizer: Muon trains the hidden matrices ({own:,} parameters), AdamW the other {others:,}"

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One step of both, with the options of `param_groups`."""
        for p, view in zip(self.matrices, self.views, strict=True):
            view.grad = None if p.grad is None else as_matrix(p.grad)
        for group, inner in zip(self.param_groups, (self.muon, self.adamw), strict=True):
            own = inner.param_groups[0]
            own.update({key: value for key, value in group.items() if key in own and key != "params"})
            inner.step()
        for view in self.views:  # else the gradients would outlive zero_grad
            view.grad = None

    def state_dict(self) -> dict[str, Any]:
        """Momentum has the shape of its weight, so that it fits a network in another memory format."""
        return {"muon": self._with_momentum(self.muon.state_dict(), like_weight), "adamw": self.adamw.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        def as_view(momentum: Tensor, weight: Tensor) -> Tensor:
            return as_matrix(torch.empty_like(weight).copy_(momentum))

        self.muon.load_state_dict(self._with_momentum(state_dict["muon"], as_view))
        self.adamw.load_state_dict(state_dict["adamw"])
        match_layout(self.adamw)

    def _with_momentum(self, state_dict: dict[str, Any], convert: Callable[[Tensor, Tensor], Tensor]) -> dict[str, Any]:
        momentum = {k: convert(entry["momentum_buffer"], self.matrices[k]) for k, entry in state_dict["state"].items()}
        return {**state_dict, "state": {k: {"momentum_buffer": value} for k, value in momentum.items()}}


def is_hidden(name: str, layer: nn.Linear | nn.Conv2d) -> bool:
    """Whether Muon trains the weight of the layer with this dotted name."""
    outer, conditioning = f".{name}".endswith(OUTER), bool(CONDITIONING & set(name.split(".")))
    return min(layer.weight.shape[:2]) >= MIN_SIDE and not outer and not conditioning


def match_layout(optimizer: torch.optim.Optimizer) -> None:
    """Give state that was loaded the memory format of its weight, which another device or precision may have changed: fused
    AdamW on a CPU takes both for the same without a check."""
    for weight, state in optimizer.state.items():
        for key, value in state.items():
            if isinstance(value, Tensor) and value.shape == weight.shape and value.stride() != weight.stride():
                state[key] = torch.empty_like(weight, dtype=value.dtype).copy_(value)


class Muon(torch.optim.Optimizer):
    """The step of `torch.optim.Muon(matrices, adjust_lr_fn="match_rms_adamw")`, for all matrices of one shape together, and in
    the precision `dtype`: that of torch is bfloat16, 20 times slower than float32 on a CPU without instructions for it
    (docs/performance.md).
    """

    def __init__(self, matrices: Iterable[Tensor], dtype: torch.dtype):
        """lr and weight_decay are set before each step."""
        super().__init__(matrices, {"lr": 0.0, "weight_decay": 0.0, "momentum": 0.95})
        self.dtype = dtype

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            present = [p for p in group["params"] if p.grad is not None]
            for shape, members in groupby(sorted(present, key=lambda p: p.shape), key=lambda p: p.shape):
                matrices = list(members)
                directions = torch.stack(self._momentum(matrices, group["momentum"]))
                steps = orthogonalize(directions.to(self.dtype)).to(directions.dtype)
                torch._foreach_mul_(matrices, 1 - group["lr"] * group["weight_decay"])
                steps *= -0.2 * math.sqrt(max(shape)) * group["lr"]
                torch._foreach_add_(matrices, steps.unbind())

    def _momentum(self, matrices: list[Tensor], momentum: float) -> list[Tensor]:
        """Nesterov momentum: moves the averages, and returns the directions."""
        for p in matrices:
            if "momentum_buffer" not in self.state[p]:
                self.state[p]["momentum_buffer"] = torch.zeros_like(p)
        gradients = [p.grad for p in matrices if p.grad is not None]
        averages = [self.state[p]["momentum_buffer"] for p in matrices]
        torch._foreach_lerp_(averages, gradients, 1 - momentum)
        return list(torch._foreach_lerp(gradients, averages, momentum))


def orthogonalize(matrices: Tensor) -> Tensor:
    """Matrices [n, rows, columns] with their singular values moved to about 1 (between 0.7 and 1.2).

    Five steps of the Newton-Schulz iteration with the coefficients of Jordan et al. 2024
    (kellerjordan.github.io/posts/muon), X <- a X + (b X X^T + c (X X^T)^2) X.
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    if matrices.shape[1] > matrices.shape[2]:  # the smaller Gram matrix
        return orthogonalize(matrices.mT).mT
    x = matrices / matrices.flatten(1).norm(dim=1).clamp(min=1e-7)[:, None, None]
    for _ in range(5):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x


def like_weight(matrix: Tensor, weight: Tensor) -> Tensor:
    """A matrix as from `as_matrix`, in the shape of the weight and contiguous."""
    if weight.dim() == 4 and not weight.is_contiguous():
        outputs, inputs, height, width = weight.shape
        matrix = matrix.view(outputs, height, width, inputs).permute(0, 3, 1, 2)
    return matrix.reshape(weight.shape).contiguous()


def as_matrix(weight: Tensor) -> Tensor:
    """[outputs, inputs, ...] as [outputs, all others], a view where it is contiguous or channels last."""
    if weight.dim() == 4 and not weight.is_contiguous():  # the order of the columns means nothing to Muon
        weight = weight.permute(0, 2, 3, 1)
    return weight.reshape(len(weight), -1)
