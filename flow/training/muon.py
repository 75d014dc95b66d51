"""Muon for the matrices of a network, AdamW for everything else, as one optimizer."""

from typing import Any

import torch
from torch import Tensor, nn

MIN_SIDE = 32  # inputs and outputs of a hidden layer: those that touch pixels have fewer
CONDITIONING = {"time_mlp", "step_embedding", "modulation"}  # layers of the embedding of time, by their names in `models`


class MuonWithAdamW(torch.optim.Optimizer):
    """Orthogonalized momentum (Jordan et al. 2024, kellerjordan.github.io/posts/muon) for the weights of hidden linear layers
    and convolutions; AdamW for norms, biases, embeddings, the layers that touch pixels, and those of the embedding of time, on
    which Muon would cost as much as on the rest of a small U-Net.

    A convolution counts as the matrix [outputs, inputs * height * width]. An orthogonal step is scaled by
    0.2 sqrt(max(rows, columns)) to the root mean square of a usual step of AdamW, so that both take the same learning rate and
    weight decay (`adjust_lr_fn="match_rms_adamw"` of torch.optim.Muon; Liu et al. 2025, arXiv:2502.16982).

    Parameters and gradients belong to the network; `torch.optim.Muon`, which takes matrices alone, works on views of them.
    """

    def __init__(self, net: nn.Module, lr: float, fused: bool, **options: Any):
        """options: of AdamW; Muon takes its weight_decay. Raises ValueError for a network without hidden matrices."""
        layers = {name: m for name, m in net.named_modules() if isinstance(m, nn.Linear | nn.Conv2d)}
        hidden = {
            id(m.weight)
            for name, m in layers.items()
            if min(m.weight.shape[:2]) >= MIN_SIDE and not CONDITIONING & set(name.split("."))
        }
        self.matrices = [p for p in net.parameters() if id(p) in hidden]
        if not self.matrices:
            raise ValueError(f"name=muon: the network has no layer with {MIN_SIDE} inputs and outputs; use adamw")
        others = [p for p in net.parameters() if id(p) not in hidden]
        super().__init__([{"params": self.matrices}, {"params": others}], {"lr": lr, **options})
        self.views = [nn.Parameter(as_matrix(p.detach())) for p in self.matrices]
        self.muon = torch.optim.Muon(self.views, adjust_lr_fn="match_rms_adamw")
        self.adamw = torch.optim.AdamW(others, fused=fused)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One step of both, with the options of `param_groups`."""
        for p, view in zip(self.matrices, self.views, strict=True):
            view.grad = None if p.grad is None else as_matrix(p.grad)
        for group, inner in zip(self.param_groups, (self.muon, self.adamw), strict=True):
            own = inner.param_groups[0]
            own.update({key: value for key, value in group.items() if key in own and key != "params"})
            inner.step()

    def state_dict(self) -> dict[str, Any]:
        return {"muon": self.muon.state_dict(), "adamw": self.adamw.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.muon.load_state_dict(state_dict["muon"])
        self.adamw.load_state_dict(state_dict["adamw"])


def as_matrix(weight: Tensor) -> Tensor:
    """[outputs, inputs, ...] as [outputs, all others], a view where it is contiguous or channels last."""
    if weight.dim() == 4 and not weight.is_contiguous():  # the order of the columns means nothing to Muon
        weight = weight.permute(0, 2, 3, 1)
    return weight.reshape(len(weight), -1)
