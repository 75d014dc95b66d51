"""What is trained: the interface between the training loop and flows or autoencoders."""

from collections.abc import Iterator, Sized
from pathlib import Path
from typing import Protocol

from torch import Tensor, nn

from flow.losses import Batch, Loss
from flow.sampling.header import PowerAverage


class Task(Protocol):
    """What is trained: a network, its loss and its data; `FlowTask` and `AutoencoderTask` are tasks."""

    net: nn.Module
    data: Sized  # what it is trained on
    sample_digest: str  # of the data, see `datasets.sample_digest`
    script: str  # that trains it, for the command that resumes
    unit: str  # what a batch holds, as in "128 images"

    @property
    def loss(self) -> Loss: ...

    def build_network(self) -> nn.Module:
        """An untrained network of the same shape, for averages of sharded weights."""

    def batches(self, first_step: int) -> Iterator[list[Batch]]:
        """The micro-batches of this process, for each step from `first_step` to the last."""

    def write_snapshot(
        self, path: Path, weights: dict[str, Tensor], step: int, half_life_images: int,
        power_average: PowerAverage | None = None,
    ) -> None:  # fmt: skip
        """Write averaged weights with what is needed to use them; for a power-function average the half-life is 0."""

    def read_snapshot(self, path: Path) -> dict[str, Tensor]:
        """The weights of a snapshot of this task. Raises UserError where they belong to another one."""

    def preview(self, net: nn.Module, step: int) -> tuple[Tensor | None, dict[str, float]]:
        """A picture uint8 [C, H, W] and metrics of the averaged network, on the main process; every process calls it. No
        picture where sampling fails."""

    def summary(self) -> list[str]:
        """Lines about data and network, for the start of the log."""

    def next_command(self, folder: Path) -> str:
        """What to do with a finished run: an imperative and a command that works as printed."""
