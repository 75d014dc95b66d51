"""What every coupling has."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar

from torch import Tensor


class Coupling(ABC):
    """Which source sample x0 belongs to which data x1 in training.

    The constructor names what it needs of `couplings.GIVEN`; its other parameters are numbers with a default, and come from
    flow.coupling_args. It raises ValueError for a value out of range, and where source and data do not fit it.
    """

    needs_data: ClassVar[bool] = False  # sample_x0 reads x1 or y, which are then on the CPU
    needs_pairs: ClassVar[bool] = False  # made by a flow (data.name=pairs)
    one_start: ClassVar[bool] = False  # each image has one start, by its index; mirrored and held-out images have none
    note: str | None = None  # for the start of the log

    @abstractmethod
    def sample_x0(self, sample_ids: Sequence[int], indices: Sequence[int], x1: Tensor, y: Tensor | None) -> Tensor:
        """x0 [b, ...], float32, on any device, for b samples of the training stream.

        sample_ids: positions in the stream. indices: of the data set. x1, y: data [b, ...], float32, and labels [b] or, for a
        network without labels and prompts, None.
        """
