"""Which source sample x0 belongs to which data x1 in training."""

import inspect
from typing import Any

from flow import registry
from flow.couplings.aligned import AlignedCoupling
from flow.couplings.base import Coupling
from flow.couplings.independent import IndependentCoupling
from flow.couplings.ot import OTCoupling
from flow.couplings.paired import PairedCoupling
from flow.source import Source

__all__ = ["COUPLINGS", "AlignedCoupling", "Coupling", "IndependentCoupling", "OTCoupling", "PairedCoupling", "build", "find"]

GIVEN = ("source", "seed", "image_shape", "rows", "data")  # arguments that do not come from flow.coupling_args
COUPLINGS: dict[str, type[Coupling]] = {
    "independent": IndependentCoupling, "ot": OTCoupling, "aligned": AlignedCoupling, "paired": PairedCoupling,
}  # fmt: skip


def find(name: str) -> type[Coupling]:
    """The class of the coupling `name`. Raises ValueError for an unknown name."""
    return registry.find("coupling", COUPLINGS, name)


def build(
    name: str, source: Source, seed: int, image_shape: tuple[int, ...], rows: int, args: dict[str, Any], data: Any = None
) -> Coupling:
    """The coupling `name` of samples of the source with data.

    rows: of the global batch that a process takes at once. args: flow.coupling_args. data: a `datasets.DataSet`, for couplings
    that take one.

    Raises ValueError for an unknown name or argument, for a value out of range, and where source and data do not fit the
    coupling.
    """
    coupling = registry.pick("coupling", COUPLINGS, name, args)
    given = dict(zip(GIVEN, (source, seed, image_shape, rows, data), strict=True))
    taken = inspect.signature(COUPLINGS[name]).parameters
    return coupling(**{key: value for key, value in given.items() if key in taken})
