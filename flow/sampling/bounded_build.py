"""Networks of a stranger's configuration, bounded by the weights that are to fill them."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook
from torch.overrides import TorchFunctionMode

from configs.errors import first_line
from flow.sampling.header import MAX_NUMBERS

FREE_SIZE = 100_000  # an argument of a network up to this is not compared with the file


def build_within(
    weights: Mapping[str, Tensor], image_shape: tuple[int, ...], args: dict[str, Any], build: Callable[[], Any],
    check_fit: Callable[[nn.Module], None],
) -> Any:  # fmt: skip
    """The network that `build()` makes, bounded by the weights that are to fill it before memory is taken.

    Whole numbers among `args` are at most as large as the longest side of a tensor, or their count; the network is first made
    without memory (torch's meta device), with about as many parameters as there are tensors at most, and compared by
    `check_fit`. Raises ValueError.
    """
    sides = (side for value in weights.values() for side in value.shape)
    limit = max(FREE_SIZE, len(weights), *image_shape, *sides)
    for name, value in args.items():
        if _largest(value) > limit:
            raise ValueError(f"{name}={str(value)[:60]}: is more than these weights have room for; at most {limit}")
    with _parameters_at_most(4 * len(weights) + 1000):  # modules that are copied and dropped register theirs as well
        try:
            with torch.device("meta"), _WithoutNormals():
                sketch = build()
        except (RuntimeError, OverflowError, MemoryError) as error:
            if "meta" not in str(error):  # else the constructor looks at numbers, and has to have them
                raise ValueError(f"cannot be built from {args}: {first_line(error)}") from None
        else:
            check_fit(sketch)
            if sum(buffer.numel() for buffer in sketch.buffers()) > MAX_NUMBERS:
                raise ValueError(f"cannot be built for images of {image_shape}: its tables would have more than 2^26 numbers")
        return build()


class _WithoutNormals(TorchFunctionMode):
    """Leaves nn.init.normal_ out, for which torch would import its compiler on the meta device: a third of the seconds of a
    start."""

    def __torch_function__(self, func: Callable, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        return kwargs["tensor"] if func is nn.init.normal_ else func(*args, **kwargs)


@contextmanager
def _parameters_at_most(allowed: int) -> Iterator[None]:
    """Modules made inside the block have no more parameters together: ValueError."""
    count = 0

    def hook(module: nn.Module, name: str, parameter: nn.Parameter) -> None:
        nonlocal count
        count += parameter is not None
        if count > allowed:
            raise ValueError("the configuration asks for many more parameters than the weights have tensors")

    handle = register_module_parameter_registration_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def _largest(value: Any) -> int:
    """The largest whole number in nested lists and dicts, by its size; 0 where there is none."""
    if isinstance(value, dict | list | tuple):
        return max((_largest(part) for part in (value.values() if isinstance(value, dict) else value)), default=0)
    return abs(value) if isinstance(value, int) else 0
