"""The network without DDP and gradient: what losses take targets and derivatives from."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import cache, partial
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode

from configs.errors import UserError, first_line
from flow.losses.flow_map import jump
from flow.path import broadcast_over
from flow.runtime import distributed

WITHOUT_JVP = "use loss.args.derivative=difference or loss.name=alpha_flow"
MAX_STEP = 0.005  # of central differences, in time; as in the code of Transition Models (arXiv:2509.04394)
MAX_PHASE = 0.15  # radians of the fastest time feature in a step: a difference makes it sin(phase) / phase = 0.996 of its slope
OWN_NAMESPACES = {"aten", "prim", "prims", "profiler"}  # of torch's operations


class EagerNetwork:
    """Implements `flow.losses.Eager` for a network on one device.

    Accelerate patches `forward` on the network itself under mixed precision, and `compile` its call, so the float32 of
    `__call__`, `jvp` and `difference` comes from the forward of its class. All calls between two `start_micro_batch` start from
    the random state of the training pass, which must be the first to draw random numbers after it: on the same number of rows
    they draw its dropout masks.
    """

    def __init__(self, net: nn.Module, derivative_error: str | None = None, sharded: nn.Module | None = None):
        """derivative_error: why there are no derivatives here, for the message of the error. sharded: the network as FSDP2 has
        it, whose hooks gather the parameters; it is called as a whole then, in the precision of training."""
        self.net, self.derivative_error = net, derivative_error
        self._forward: Callable[..., Tensor] = sharded or partial(type(net).forward, net)
        self._as_trained: Callable[..., Tensor] = sharded or net
        self.null: int | None = getattr(net, "null", None)
        self._device = next(net.parameters()).device
        frequencies: list[Any] = [module.time_frequency for module in net.modules() if hasattr(module, "time_frequency")]
        self.difference_step = min([MAX_STEP, *(MAX_PHASE / frequency for frequency in frequencies)])  # of `difference`
        self._foreign: set[str] | None = None  # operations in it that are not torch's; None: not looked for yet
        self.start_micro_batch()

    def start_micro_batch(self) -> None:
        """Remember the random state from which the masks of this micro-batch are drawn."""
        on_cpu = self._device.type == "cpu"
        self._state = torch.get_rng_state() if on_cpu else torch.get_device_module(self._device).get_rng_state(self._device)

    def __call__(self, x: Tensor, t: Tensor, y: Tensor | None = None, t_next: Tensor | None = None) -> Tensor:
        """The output [b, ...], float32, without gradient."""
        with self._plain(), without_tf32(), torch.no_grad():
            return self._forward(x, t, y, t_next)

    def as_trained(self, x: Tensor, t: Tensor, y: Tensor | None = None, t_next: Tensor | None = None) -> Tensor:
        """The output [b, ...], float32, without gradient, rounded as in the training pass (its autocast, its compilation)."""
        with self._plain(), torch.no_grad():
            return self._as_trained(x, t, y, t_next).float()

    def jvp(self, x: Tensor, t: Tensor, y: Tensor | None, t_next: Tensor | None, v: Tensor, precision: str = "no") -> Tensor:
        """du/dt [b, ...], float32: the derivative of the output u along dx/dt = v, dt/dt = 1, with t_next fixed.

        Fused attention kernels have no forward-mode derivative, so attention uses the math kernel here.
        precision: bf16 computes it under autocast.

        Raises:
            UserError: where `derivative_error` says why there is none, and where an operation of the network has none.
        """
        if self.derivative_error:
            raise UserError(self.derivative_error)

        def output(x: Tensor, t: Tensor) -> Tensor:
            return self._forward(x, t, y, t_next)

        bf16 = precision == "bf16"
        exact = nullcontext() if bf16 else without_tf32()
        watch = ForeignOperations() if self._foreign is None else nullcontext()
        with (
            self._plain(bf16), exact, torch.no_grad(), sdpa_kernel(SDPBackend.MATH), contiguous_norms(self.net),
            one_line_jvp_errors(), watch as foreign,
        ):  # fmt: skip
            _, du_dt, *_ = torch.func.jvp(output, (x, t), (v, torch.ones_like(t)))
        if foreign:
            self._foreign = foreign.names
        if self._foreign:
            self._check_derivative(x, t, y, t_next, v, du_dt)
        return du_dt.float() if bf16 else du_dt

    def difference(self, x: Tensor, t: Tensor, y: Tensor | None, t_next: Tensor | None, v: Tensor) -> Tensor:
        """du/dt [b, ...] as in `jvp`, float32, by a central difference: two passes, for any network.

        From t - h to t + h, cut at 0, 1 and t_next, with a step h that follows from the network's `time_frequency`. The error
        is h^2 / 6 of the third derivative in t, at a cut h / 2 of the second, and rounding, 1e-7 of the output divided by h.

        Raises:
            UserError: where `derivative_error` says why there is none.
        """
        if self.derivative_error:
            raise UserError(self.derivative_error)
        low, high = (t - self.difference_step).clamp(min=0), (t + self.difference_step).clamp(max=1)
        if t_next is not None:  # beyond it the network has not been trained
            high = torch.where(t_next > t, torch.minimum(high, t_next), high)
        before, after = (self(jump(x, t, end, v), end, y, t_next) for end in (low, high))
        return (after - before) / broadcast_over(high - low, x)

    def _check_derivative(
        self, x: Tensor, t: Tensor, y: Tensor | None, t_next: Tensor | None, v: Tensor, du_dt: Tensor
    ) -> None:
        """Torch takes operations of `torch.library` for constants here, without a word: compare with central differences.

        Raises:
            UserError: where they differ. A network whose output does not change yet is looked at again.
        """
        differences = self.difference(x, t, y, t_next, v)
        if not differences.any():
            return
        if (du_dt - differences).norm() > 0.2 * differences.norm():
            names = ", ".join(sorted(self._foreign or ()))
            raise UserError(f"the network has no forward-mode derivative, as {names} has none; {WITHOUT_JVP}")
        self._foreign = set()

    @contextmanager
    def _plain(self, bf16: bool = False) -> Iterator[None]:
        kind = self._device.type
        others = [] if kind == "cpu" else [self._device]  # the state of the CPU is restored in any case
        with torch.random.fork_rng(others, device_type=kind), torch.autocast(kind, torch.bfloat16, enabled=bf16):
            if others:
                torch.get_device_module(self._device).set_rng_state(self._state, self._device)
            else:
                torch.set_rng_state(self._state)
            yield


def build(net: nn.Module, wrapped_net: nn.Module, accelerator: Accelerator) -> EagerNetwork:
    """The `EagerNetwork` of a network that Accelerate has prepared; that of FSDP2 also gets the autocast that other networks
    have from Accelerate."""
    if not accelerator.is_fsdp2:
        return EagerNetwork(net)
    distributed.autocast_forward(wrapped_net, accelerator)
    return EagerNetwork(net, "a derivative needs float32, in which FSDP2 has no sharded network", sharded=wrapped_net)


@contextmanager
def without_tf32() -> Iterator[None]:
    """Convolutions in float32 on GPUs, whose default for it is TF32: its rounding, 5e-4 of the output, would be larger than a
    central difference leaves of it."""
    cudnn: Any = torch.backends.cudnn
    before, cudnn.allow_tf32 = cudnn.allow_tf32, False
    try:
        yield
    finally:
        cudnn.allow_tf32 = before


@contextmanager
def one_line_jvp_errors() -> Iterator[None]:
    """Raises UserError, which names what to use instead, where torch has no forward-mode derivative of an operation."""
    try:
        yield
    except NotImplementedError as error:
        if "forward AD" not in str(error):  # torch's words; else it is the network's own error
            raise
        raise UserError(f"the network has no forward-mode derivative ({first_line(error)}); {WITHOUT_JVP}") from error


@contextmanager
def contiguous_norms(net: nn.Module) -> Iterator[None]:
    """Group norms get contiguous features inside, in a torch whose group norm has no derivative for channels_last."""
    norms = [] if norm_has_jvp() else [module for module in net.modules() if isinstance(module, nn.GroupNorm)]
    hooks = [norm.register_forward_pre_hook(lambda _, inputs: (inputs[0].contiguous(),)) for norm in norms]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@cache
def norm_has_jvp() -> bool:
    """Whether torch's group norm has a forward-mode derivative for features in channels_last: 2.11 has none, 2.14 does."""
    x = torch.ones(2, 4, 3, 3).to(memory_format=torch.channels_last)
    try:
        torch.func.jvp(lambda x: torch.nn.functional.group_norm(x, 2), (x,), (x,))
    except RuntimeError:
        return False
    return True


class ForeignOperations(TorchDispatchMode):
    """Collects the names of operations that are not torch's own."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, operation: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if operation.namespace not in OWN_NAMESPACES:
            self.names.add(str(operation))
        return operation(*args, **(kwargs or {}))
